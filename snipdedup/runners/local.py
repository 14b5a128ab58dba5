"""What a runner is; tasks on this machine: by threads, or by processes forked from this one.

Threads take turns at Python's lock, and a task is thousands of short steps, so forked processes are
faster for large sets. They share this process's memory as long as they only read it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from snipdedup.errors import SnipError
from snipdedup.parallel import ordered_map, pick_device, set_threads

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of Linux' prctl
_worker: list[Any] = []  # in a forked process: the function and its tasks


class Runner(Protocol):
    """Who does the tasks of a run."""

    workers: int  # tasks that run at the same time, on all machines together
    here: int  # those of them that share the memory of one machine
    world_size: int  # processes that run this same code for the same OUT; 1 but in `slurm`

    def each(
        self, do: Callable[[T], None], tasks: Sequence[T], done_file: Callable[[T], Path],
        within: int = 1, *, last: bool = False,
    ) -> Iterator[T]:  # fmt: skip
        """Do tasks in any order, each on ``within`` threads; yield each task that is done.

        ``do`` returns at once where a task's files are there and whole. After the ``last`` tasks
        only one process goes on; the others raise `slurm.ShareDone`.
        """


def run_once(runner: Runner, do: Callable[[], None], done_file: Path) -> None:
    """Do one task that all later ones need, on all threads of one machine."""
    for _ in runner.each(lambda _: do(), [done_file], lambda path: path, runner.here):
        pass


class Local:
    """Threads of this process; with ``forks``, forked processes, on Linux and without a GPU."""

    world_size = 1

    def __init__(self, threads: int, *, forks: bool = False, device: str = "auto") -> None:
        self.workers = self.here = threads
        self.forks, self.device = forks and sys.platform == "linux", device

    def each(
        self, do: Callable[[T], None], tasks: Sequence[T], done_file: Callable[[T], Path],
        within: int = 1, *, last: bool = False,
    ) -> Iterator[T]:  # fmt: skip
        """See `Runner.each`."""
        del done_file, last

        def perform(task: T) -> T:
            do(task)
            return task

        if within > 1:
            yield from map(perform, tasks)
        elif self.forks and min(self.here, len(tasks)) > 1 and pick_device(self.device) == "cpu":
            yield from in_processes(do, tasks, min(self.here, len(tasks)))
        else:
            yield from ordered_map(perform, tasks, self.here)


def in_processes(do: Callable[[T], None], tasks: Sequence[T], workers: int) -> Iterator[T]:
    """Do tasks by forked processes; yield each that is done, raise what a task raised."""
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=start_worker,
        initargs=(do, tasks, os.getpid()),  # passed by the fork: nothing is pickled
    )
    processes: list[Any] = []
    gc.freeze()  # else a worker's first garbage collection copies every page that holds an object
    try:
        numbers = {pool.submit(do_numbered, number): number for number in range(len(tasks))}
        processes = list((pool._processes or {}).values())
        for future in as_completed(numbers):
            future.result()
            yield tasks[numbers.pop(future)]
        processes = []
    except BrokenProcessPool as error:
        raise SnipError(
            "a worker process ended early, perhaps for want of memory; what is done is kept: run "
            "it again, with a lower --max_memory or fewer --threads"
        ) from error
    finally:
        gc.unfreeze()
        for process in processes:  # still at work on tasks that nobody waits for
            process.kill()
        pool.shutdown(cancel_futures=True)


def start_worker(do: Callable[[Any], None], tasks: Sequence[Any], parent: int) -> None:
    """Prepare a forked process, which must not outlive its parent: it keeps OUT locked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent was killed before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and kills this one
    set_threads(1)
    _worker[:] = do, tasks


def do_numbered(number: int) -> None:
    """Do a task in a forked process."""
    do, tasks = _worker
    do(tasks[number])
