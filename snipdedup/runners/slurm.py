"""One of several processes that run the same line with the same OUT, as in a Slurm array.

Of each stage, rank r of W does the tasks whose number is r modulo W, then waits for the done files
of the others. Nothing but files passes between the processes, and no file is ever changed: each
appears whole, and is the same whoever writes it. Only rank 0 writes the result.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from snipdedup import progress
from snipdedup.config import SHARED_URL, Dedup, Embed
from snipdedup.errors import SnipError, UsageError
from snipdedup.runners.local import Local
from snipdedup.storage import atomic, locks
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import is_remote

T = TypeVar("T")

PAUSE_S = 0.2  # between looks for done files
PATIENCE_S = 120.0  # without a new done file, before the missing ranks are named
SHOWN_RANKS = 8  # that a message names


class Share(NamedTuple):
    """Which of how many processes this is."""

    rank: int  # from 0
    world_size: int


class ShareDone(Exception):  # noqa: N818 - not an error
    """Nothing is left to do for this process; the text says what the others do."""


class Slurm:
    """A process with its share of the tasks, which ``local`` does; it has claimed ``out``."""

    def __init__(self, out: Path, share: Share, local: Local) -> None:
        self.out, self.local = out, local
        self.rank, self.world_size = share
        self.here, self.workers = local.here, local.here * share.world_size
        lock = out / locks.WORK / f"rank-{self.rank:04d}.lock"
        with atomic.explained(lock):
            other = locks.acquire(lock)
            if other is not None:
                raise SnipError(
                    f"--task_index {self.rank}: {other} writes {out} with the same index; give "
                    "each process its own, from 0 on"
                )
            os.utime(lock)
            self.began = lock.stat().st_mtime  # by the clock of the file system

    def each(
        self, do: Callable[[T], None], tasks: Sequence[T], done_file: Callable[[T], Path],
        within: int = 1, *, last: bool = False,
    ) -> Iterator[T]:  # fmt: skip
        """See `Runner.each`; tasks done before this process began are checked by it, too."""
        own: list[T] = []
        others: dict[int, deque[T]] = {}  # by rank
        ends = last and self.rank > 0
        for number, task in enumerate(tasks):
            rank = number % self.world_size
            if rank == self.rank or (not ends and self.is_older(done_file(task))):
                own.append(task)
            else:
                others.setdefault(rank, deque()).append(task)

        def do_if_open(task: T) -> None:
            self.refuse_finished()  # if this process slept meanwhile
            do(task)

        yield from self.local.each(do_if_open, own, done_file, within)
        if ends:
            raise ShareDone(
                f"rank {self.rank} of {self.world_size}: its share is done; rank 0 waits for all, "
                f"and writes {self.out}"
            )
        yield from self.wait(others, done_file)

    def wait(self, others: dict[int, deque[T]], done_file: Callable[[T], Path]) -> Iterator[T]:
        """Wait for the tasks of other ranks; yield each whose done file is there."""
        latest = time.monotonic()
        with progress.bar(sum(map(len, others.values())), "waiting", "tasks") as bar:
            while others := {rank: left for rank, left in others.items() if left}:
                self.refuse_finished()
                done = [left.popleft() for left in others.values() if done_file(left[0]).is_file()]
                for task in done:
                    yield task
                    bar.update(1)
                if done:
                    latest = time.monotonic()
                    continue
                more = ", ..." if len(others) > SHOWN_RANKS else ""
                named = f"ranks {str(sorted(others)[:SHOWN_RANKS])[1:-1]}{more}"
                bar.set_postfix_str(f"for {named}")
                if time.monotonic() - latest > PATIENCE_S:
                    latest = time.monotonic()
                    progress.say(
                        f"waiting for {named} of {self.world_size}: no task was done for "
                        f"{PATIENCE_S:.0f} s. Start again what does not run, by the same line; or "
                        "stop all, and run it without --task_index and --num_tasks: it does what "
                        "is missing"
                    )
                time.sleep(PAUSE_S)

    def is_older(self, done_file: Path) -> bool:
        """Tell whether a task was done before this process began."""
        try:
            return done_file.stat().st_mtime < self.began
        except FileNotFoundError:
            return False

    def refuse_finished(self) -> None:
        """Raise `ShareDone` if OUT is finished: its work folder must not come back."""
        if (self.out / MANIFEST).is_file():
            raise ShareDone(f"{self.out} is finished; another process wrote it")


def share_of(options: Dedup | Embed, environ: Mapping[str, str] = os.environ) -> Share | None:
    """Return this process's share: by flags, or in a Slurm array; None if it runs alone."""
    count, rank = options.num_tasks, options.task_index
    if count is None and rank is None:
        alone = options.runner != "local" or options.overwrite
        if isinstance(options, Dedup):
            alone = alone or options.method not in (None, "join") or options.index is not None
        share = None if alone else slurm_share(environ)
        if share is not None and is_remote(options.out):
            raise UsageError(SHARED_URL)
        return share
    if options.out is None:
        raise UsageError("--num_tasks needs --out, the folder that all processes share")
    if count is None or rank is None:
        missing = "--num_tasks" if count is None else "--task_index"
        raise UsageError(
            f"--task_index I and --num_tasks N go together, I from 0; give {missing} too"
        )
    return Share(rank, count)


def slurm_share(environ: Mapping[str, str]) -> Share | None:
    """Return the share of a task of a Slurm array; None outside one.

    An array whose indices have gaps is refused: some ranks would be missing.
    """
    try:
        count = int(environ["SLURM_ARRAY_TASK_COUNT"])
        least = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
        rank = (int(environ["SLURM_ARRAY_TASK_ID"]) - least) // step
        most = int(environ.get("SLURM_ARRAY_TASK_MAX", least + (count - 1) * step))
    except (LookupError, ValueError, ZeroDivisionError):
        return None
    if rank >= count or (most - least) // step != count - 1:
        raise UsageError(
            f"expected a Slurm array without gaps, such as --array=0-{count - 1}; found {count} "
            f"tasks with indices from {least} to {most}"
        )
    return Share(rank, count)
