"""What a runner is, and which one a run gets.

A runner does the tasks of a run. A task leaves files, the last of them its done file; its files are
the same bit for bit whoever does it, so runners differ in speed only. To add one, for Dask say:
write ``runners/dask.py`` with a class that has what `Runner` lists (`ray` is an example), make it
in `open_runner`, and add its name to the choices of ``--runner`` in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from snipdedup.runners.local import Local
from snipdedup.runners.ray import Ray
from snipdedup.runners.slurm import Share, Slurm

T = TypeVar("T")

FORK_ROWS = 1 << 18  # from this size on, processes are faster than threads


class Runner(Protocol):
    """Who does the tasks."""

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


@contextmanager
def open_runner(
    name: str, threads: int, device: str, *,
    rows: int = 0, share: Share | None = None, out: Path | None = None,
) -> Iterator[Runner]:  # fmt: skip
    """Yield the runner of that name, on so many threads; close it after the block.

    ``rows`` is the size of the set where processes may be forked, else 0. With a ``share``, this
    process is one of several that write ``out``.
    """
    local = Local(threads, forks=rows >= FORK_ROWS, device=device)
    if share is not None and out is not None:
        yield Slurm(out, share, local)
    elif name == "ray":
        ray = Ray(threads)
        try:
            yield ray
        finally:
            ray.close()
    else:
        yield local
