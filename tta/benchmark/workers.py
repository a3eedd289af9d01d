"""Where cells run: in this process, in processes of this machine, or on a Ray cluster. One failed cell stops no other.

Each of the three takes a task and cells, and gives pairs (cell, outcome) as they come. Workers send their outcomes back:
the one who asked writes them, so a cluster needs no file system in common.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from tta.allocator import keep_freed_memory
from tta.benchmark.cells import Cell, Failure, Outcome

Task = Callable[[Cell], Outcome]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DIED = "The process died before it was done; it may have been killed for memory."


def here(task: Task, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """One cell after another in this process."""
    for cell in cells:
        yield cell, task(cell)


def in_processes(task: Task, cells: Iterable[Cell], jobs: int) -> Iterator[tuple[Cell, Outcome]]:
    """Cells in so many fresh processes, which share the cores, and take turns at the GPUs.

    When a process dies, the cells that were running are run once more, each alone; one whose process dies again has
    failed, and the others go on.
    """
    waiting = deque(cells)
    while waiting:
        running: dict[Future[Outcome], Cell] = {}
        with _pool(jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running[pool.submit(task, waiting[0])] = waiting[0]
                        waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = _outcome(future)
                        yield running.pop(future), outcome
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
    """Cells over the machines and GPUs of a Ray cluster, one GPU a cell where there are any.

    Args:
        task: runs a cell.
        cells: which.
        address: of the cluster (``auto`` finds the one of this machine), or ``local`` for one made for the occasion.

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
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(task)
        running = {remote.remote(cell): cell for cell in cells}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Failure(str(error).strip().splitlines()[0])
            yield cell, outcome
    finally:
        ray.shutdown()


def _outcome(future: "Future[Outcome]") -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # the task itself raises nothing; its outcome may not be fit to be sent
        return Failure(f"{type(error).__name__}: {error}")


def _pool(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would share a torch without its threads
    gpus = _gpus()
    turns = context.SimpleQueue()
    for number in range(jobs):
        turns.put(gpus[number % len(gpus)] if len(gpus) > 1 else None)
    return ProcessPoolExecutor(jobs, context, _start, (max(1, _threads() // jobs), turns))


def _threads() -> int:
    """Threads that may be used in all: what the environment says, else the cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit():
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs of this machine that may be used, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _start(threads: int, turns: Any) -> None:
    """Prepare a worker process; torch, imported later, reads what is set here."""
    for name in THREADS:
        os.environ[name] = str(threads)
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
