"""Who does the tasks of a join: threads or processes here, Ray workers, or a crew of processes.

A task leaves a mark, its last file. `Runner.each` yields tasks as their marks stand; nothing else
is said between those who work, so the result is the same whoever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from snipdedup.config import Dedup
from snipdedup.parallel import cores, ordered_map, pick_device
from snipdedup.runners.forked import can_fork, in_processes
from snipdedup.runners.ray import Ray
from snipdedup.runners.slurm import Crew, Place

T = TypeVar("T")

FORK_ROWS = 1 << 18  # from here on the work is worth processes of its own


class Runner(Protocol):
    """Who does the tasks.

    Attributes
    ----------
    workers : int
        Tasks that run side by side, all in all.
    here : int
        Of these, those that share the memory of this machine.
    """

    workers: int
    here: int

    def once(self, do: Callable[[], None], mark: Path) -> None:
        """Do what all others wait for."""

    def each(
        self,
        do: Callable[[T], None],
        tasks: Sequence[T],
        mark: Callable[[T], Path],
        within: int = 1,
    ) -> Iterator[T]:
        """Do tasks in any order, each on ``within`` threads; yield each one that is done.

        ``do`` does nothing where the task is done already and its files are whole.
        """

    def finish(self) -> None:
        """End what is shared: the rest is done by one process."""


class Local:
    """Threads of this process; with ``forks`` processes forked from it, unless there is a GPU."""

    def __init__(self, threads: int, *, forks: bool = False, device: str = "auto") -> None:
        self.workers = self.here = threads
        self.forks, self.device = forks, device

    def once(self, do: Callable[[], None], mark: Path) -> None:
        """See `Runner.once`."""
        del mark
        do()

    def each(
        self,
        do: Callable[[T], None],
        tasks: Sequence[T],
        mark: Callable[[T], Path],
        within: int = 1,
    ) -> Iterator[T]:
        """See `Runner.each`."""
        del mark

        def run(task: T) -> T:
            do(task)
            return task

        workers = self.here if within == 1 else 1
        several = min(workers, len(tasks)) > 1
        if self.forks and several and pick_device(self.device) == "cpu":
            yield from in_processes(do, tasks, workers)
        else:
            yield from ordered_map(run, tasks, workers)

    def finish(self) -> None:
        """See `Runner.finish`."""


@contextmanager
def open_runner(
    options: Dedup, out: Path | None, place: Place | None, *, rows: int = 0
) -> Iterator[Runner]:
    """Yield who is to do the tasks; ``rows`` is how large the set is, where forking is allowed."""
    threads = cores(options.threads)
    if place is not None and out is not None:
        with Crew(out, place, threads) as crew:
            yield crew
    elif options.runner == "ray":
        ray = Ray(threads)
        try:
            yield ray
        finally:
            ray.finish()
    else:
        yield Local(threads, forks=rows >= FORK_ROWS and can_fork(), device=options.device)
