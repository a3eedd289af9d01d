"""Workers: cells run in this process, in processes of this machine, or on a Ray cluster. One failed cell stops no other.

Each of the three functions takes a task and cells, and yields pairs (cell, outcome) as they finish. Workers return their
outcomes and the caller writes them, so that a cluster needs no shared file system. A cell is taken when there is room
for it, so that several processes may share the cells.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any

from tta.allocator import keep_freed_memory
from tta.benchmark.cells import Cell, Failure, Outcome

Task = Callable[[Cell], Outcome]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
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


def over_ray(task: Task, cells: Iterable[Cell], address: str) -> Iterator[tuple[Cell, Outcome]]:
    """Cells on the machines and GPUs of a Ray cluster; one GPU per cell where there are any.

    Args:
        task: runs a cell.
        cells: the cells to run.
        address: address of the cluster (``auto`` finds one on this machine), or ``local`` to start one for this call.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("Ray is not installed. Get it with: pip install 'tta-toolkit[ray]'") from None
    where = {"include_dashboard": False} if address == "local" else {"address": address}
    ray.init(log_to_driver=False, **where)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(_in_worker)
        waiting = iter(cells)
        running: dict[Any, Cell] = {}
        while True:
            # Twice as many as can run, so that none waits for this process, and no more: others may share the work.
            room = max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
            for cell in islice(waiting, room - len(running)):
                running[remote.remote(task, cell)] = cell
            if not running:
                break
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Failure(str(error).strip().splitlines()[0])
            yield cell, outcome
    finally:
        ray.shutdown()


def _in_worker(task: Task, cell: Cell) -> Outcome:
    keep_freed_memory()  # Ray starts its processes itself: there is no initialiser as in _pool
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
