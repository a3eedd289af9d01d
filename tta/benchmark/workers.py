"""Workers: cells run in this process, in processes of this machine, or on a Ray cluster. One failed cell stops no other.

Each of the three functions takes a task and cells, and yields pairs (cell, outcome) as they finish. Workers return their
outcomes and the caller writes them, so that a cluster needs no shared file system. A cell is taken when there is room
for it, so that several processes may share the cells.
"""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any

from tta import config
from tta.allocator import keep_freed_memory
from tta.benchmark.cells import Cell, Failure, Outcome

Task = Callable[[Cell], Outcome]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OF_RAY = ("CPU", "GPU", "memory")  # have arguments of their own
OF_NO_CELL = ("node:", "object_store_memory")  # what a machine has besides: its own name, and room for Ray's objects
RETRIES = 3  # of a cell whose machine or process dies
POLL_SECONDS = 10.0  # between two looks at the cluster's machines
DIED = "The process died before it was done; it may have run out of memory."


def here(task: Task, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """One cell after another in this process."""
    for cell in cells:
        yield cell, task(cell)


def in_processes(task: Task, cells: Iterable[Cell], jobs: int) -> Iterator[tuple[Cell, Outcome]]:
    """Cells in ``jobs`` fresh processes, which share the cores; GPUs are assigned to them in turn.

    When a process dies, the cells that were running are run once more, each alone. One whose process dies again has
    failed, and the others go on.
    """
    waiting, next_up = iter(cells), deque[Cell]()
    while next_up or (next_up := deque(islice(waiting, 1))):
        running: dict[Future[Outcome], Cell] = {}
        with _pool(jobs) as pool:
            try:
                while next_up or running:
                    while next_up and len(running) < jobs:
                        running[pool.submit(task, next_up[0])] = next_up[0]
                        next_up.popleft()
                        # Taken only when there is room for it: another process may have it until then.
                        next_up.extend(islice(waiting, 1) if len(running) < jobs else ())
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = _outcome(future)
                        yield running.pop(future), outcome
                    next_up.extend(islice(waiting, 1) if not next_up else ())
            except BrokenProcessPool:
                pass
        for cell in running.values():
            with _pool(1) as pool:
                try:
                    outcome = _outcome(pool.submit(task, cell))
                except BrokenProcessPool:
                    outcome = Failure(DIED)
            yield cell, outcome


def over_ray(
    task: Task,
    cells: Iterable[Cell],
    address: str,
    resources: Mapping[str, float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Cell, Outcome]]:
    """Cells on the machines and GPUs of a Ray cluster. Those of a machine that dies are run again, at most three times.

    Args:
        task: runs a cell.
        cells: the cells to run.
        address: address of the cluster (``auto`` finds one on this machine), or ``local`` to start one for this call.
        resources: what a cell takes of its machine, by Ray's names: ``CPU``, ``GPU``, ``memory`` in bytes, and those that
            a machine was started with. Left out: one CPU, and one GPU where the cluster has any.
        say: called once, with a sentence, when no machine is left that has what a cell takes.

    Raises:
        ImportError: Ray is not installed.
        ConfigError: no machine of the cluster has what a cell takes.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("Ray is not installed. Get it with: pip install 'tta-toolkit[ray]'") from None
    # Without an address Ray would connect to a cluster that happens to run on this machine.
    alone: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, **alone)
    try:
        taken = _taken(ray, resources or {})
        remote = ray.remote(max_retries=RETRIES, **_options(taken))(_in_worker)
        waiting = iter(cells)
        running: dict[Any, Cell] = {}
        said = False
        while True:
            # Twice as many as can run, so that none waits for this process, and no more: others may share the work.
            places = _places(ray, taken)
            room = max(1, 2 * places) - len(running)  # negative where a machine has gone
            for cell in islice(waiting, max(0, room)):
                running[remote.remote(task, cell, os.getcwd())] = cell
            if not running:
                break
            if not places and not said:
                said = True
                say(f"No machine is left that has what a cell takes ({_listed(taken)}): waiting for one.")
            # Looks up now and then, for machines that have joined or gone.
            for done in ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)[0]:
                cell = running.pop(done)
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    outcome = Failure(_reason(error))
                yield cell, outcome
    finally:
        ray.shutdown()


def _taken(ray: Any, resources: Mapping[str, float]) -> dict[str, float]:
    """Resources that a cell takes of its machine; a ConfigError if that is nothing, or more than any machine has."""
    gpu = 1 if any(machine.get("GPU") for machine in _machines(ray)) else 0
    taken = {name: amount for name, amount in {"CPU": 1, "GPU": gpu, **resources}.items() if amount}
    if not taken:
        raise config.ConfigError(f"A cell takes something of its machine; got resources={dict(resources)!r}.")
    if not _places(ray, taken):
        raise config.ConfigError(
            f"No machine of the Ray cluster has what a cell takes ({_listed(taken)}). There are: "
            f"{'; '.join(map(_listed, _machines(ray)))}. Set resources=, or start a machine that has it."
        )
    return taken


def _options(taken: Mapping[str, float]) -> dict[str, Any]:
    """The same as Ray's arguments. One that is left out is no zero: a task takes a CPU then."""
    of_ray = {"num_cpus": taken.get("CPU", 0), "num_gpus": taken.get("GPU", 0), "memory": taken.get("memory")}
    return {**of_ray, "resources": {name: amount for name, amount in taken.items() if name not in OF_RAY}}


def _machines(ray: Any) -> list[dict[str, float]]:
    """Resources of each machine of the cluster that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _places(ray: Any, taken: Mapping[str, float]) -> int:
    """Number of cells that the cluster can run at once."""
    return sum(min(int(machine.get(name, 0) / amount) for name, amount in taken.items()) for machine in _machines(ray))


def _listed(resources: Mapping[str, float]) -> str:
    shown = {name: amount for name, amount in resources.items() if not name.startswith(OF_NO_CELL)}
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(shown.items())) or "nothing"


def _reason(error: Exception) -> str:
    """The first line of what went wrong, not of Ray's words on where."""
    cause = getattr(error, "cause", None)
    said = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
    return said.strip().splitlines()[0]


def _in_worker(task: Task, cell: Cell, folder: str) -> Outcome:
    # Ray starts its processes in the folder where the machine joined; the paths of a cell are meant from the caller's.
    with contextlib.suppress(OSError):
        os.chdir(folder)
    keep_freed_memory()  # there is no initialiser as in _pool
    return task(cell)


def _outcome(future: "Future[Outcome]") -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # a task raises nothing, but its outcome may not be picklable
        return Failure(f"{type(error).__name__}: {error}")


def _pool(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a forked child would have torch without its threads
    gpus = _gpus()
    turns = context.SimpleQueue()
    for number in range(jobs):
        turns.put(gpus[number % len(gpus)] if len(gpus) > 1 else None)
    return ProcessPoolExecutor(jobs, context, _start, (max(1, _threads() // jobs), turns))


def _threads() -> int:
    """Number of threads for all processes together: ``OMP_NUM_THREADS``, else the cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit():
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The usable GPUs of this machine, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _start(threads: int, turns: Any) -> None:
    """Prepare a worker process before torch, which reads these variables, is imported."""
    for name in THREADS:
        os.environ[name] = str(threads)
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone; without this, a worker of a killed parent would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
