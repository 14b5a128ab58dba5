"""Who does the tasks of a join: threads, Ray workers, or processes that share a file system.

A task leaves a mark, its last file. `Runner.each` yields tasks as their marks stand; nothing else
is said between those who work, so the result is the same whoever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from snipdedup.ground.compute import cores, in_order
from snipdedup.search.crew import Crew, Place
from snipdedup.search.raycluster import Ray
from snipdedup.settings import Dedup

T = TypeVar("T")


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
    """Threads of this process."""

    def __init__(self, threads: int) -> None:
        self.workers = self.here = threads

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

        yield from in_order(run, tasks, self.here if within == 1 else 1)

    def finish(self) -> None:
        """See `Runner.finish`."""


@contextmanager
def open_runner(options: Dedup, out: Path | None, place: Place | None) -> Iterator[Runner]:
    """Yield who is to do the tasks."""
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
        yield Local(threads)
