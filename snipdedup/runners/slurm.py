"""Several processes that share OUT, and nothing else: they know of each other by claims.

They may run at once or one after another, be killed, and start again; whoever is there goes on with
what is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from snipdedup import progress
from snipdedup.config import Dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.parallel import ordered_map
from snipdedup.runners.claims import Claims
from snipdedup.storage import store

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0
SAID_EVERY_S = 10.0


class Written(Exception):  # noqa: N818 - not an error
    """Another process finished the run."""


class Place(NamedTuple):
    """Which of how many processes this is."""

    number: int
    of: int


class Crew:
    """One of several processes that share OUT and know of each other by claims only.

    Each begins with its own share of the tasks and goes on with what is left. Marks count from the
    start of the session on, which ends when no process is left: older ones are looked at again.

    Parameters
    ----------
    out : Path
        The folder that all processes write.
    place : Place
    threads : int
    """

    def __init__(self, out: Path, place: Place, threads: int) -> None:
        self.out, self.manifest, self.place = out, out / store.MANIFEST, place
        self.claims = Claims(out / store.WORK / "claims")
        self.here, self.workers = threads, threads * place.of
        self.since = 0.0

    def __enter__(self) -> Crew:
        self.claims.__enter__()
        self.claims.take("session")
        begun = self.claims.holder("session")
        self.since = begun[1] if begun else float("inf")
        return self

    def __exit__(self, *exc: object) -> None:
        self.claims.__exit__(*exc)

    def once(self, do: Callable[[], None], mark: Path) -> None:
        """See `Runner.once`."""
        for _ in self.each(lambda _: do(), [mark], lambda path: path, self.here):
            pass

    def each(
        self,
        do: Callable[[T], None],
        tasks: Sequence[T],
        mark: Callable[[T], Path],
        within: int = 1,
    ) -> Iterator[T]:
        """See `Runner.each`."""

        def help_with(task: T) -> tuple[T, bool]:
            return task, self.is_fresh(mark(task)) or self.do_claimed(do, task, mark(task))

        left, waiting = own_first(tasks, self.place), Waiting()
        while left:
            self.refuse_written()
            still = []
            for task, done in ordered_map(help_with, left, self.here if within == 1 else 1):
                if done:
                    yield task
                else:
                    still.append(task)
            if len(still) == len(left):
                waiting.more(self.describe(mark(still[0])))
            else:
                waiting = Waiting()
            left = still

    def do_claimed(self, do: Callable[[T], None], task: T, mark: Path) -> bool:
        """Do a task unless another process is at it; tell whether it is done."""
        name = "-".join(mark.parts[-3:])
        if not self.claims.take(name):
            return False
        try:
            if not self.is_fresh(mark):  # nor did another one do it just now
                do(task)
                os.utime(mark)
        except (OSError, SnipError):
            self.refuse_written()  # taken for dead, while the others went on and tidied up
            raise
        finally:
            self.claims.give_up(name)
        return True

    def is_fresh(self, mark: Path) -> bool:
        """Tell whether a task was done, or found done and whole, since the session began."""
        try:
            return mark.stat().st_mtime >= self.since
        except FileNotFoundError:
            return False

    def finish(self) -> None:
        """Wait until the run is written, or nobody else is at writing it.

        Raises
        ------
        Written
            If another process wrote it.
        """
        waiting = Waiting()
        while not self.manifest.is_file():
            if self.claims.take("finish"):
                return
            waiting.more(self.describe(Path("finish")))
        self.refuse_written()

    def refuse_written(self) -> None:
        """Raise `Written` where the run is finished."""
        if self.manifest.is_file():
            raise Written(
                f"{self.out} is finished; another of the {self.place.of} processes wrote it"
            )

    def describe(self, mark: Path) -> str:
        """Say what is waited for."""
        held = self.claims.holder("-".join(mark.parts[-3:]))
        return f"{mark}" + (f", which {held[0]} is at" if held else "")


class Waiting:
    """Sleeps longer each time, and says now and then what for."""

    def __init__(self) -> None:
        self.pause, self.said = FIRST_WAIT_S, time.monotonic()

    def more(self, what: str) -> None:
        """Sleep once."""
        if time.monotonic() - self.said >= SAID_EVERY_S:
            self.said = time.monotonic()
            progress.say(f"waiting for {what}")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_WAIT_S)


def own_first(tasks: Sequence[T], place: Place) -> list[T]:
    """Return tasks in the order in which one of several processes takes them.

    Every ``count``-th is its own; then come those of the next process, and so on.
    """
    order = sorted(range(len(tasks)), key=lambda n: ((n - place.number) % place.of, n))
    return [tasks[number] for number in order]


def place_of(options: Dedup, environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return which of how many processes this is: by flags, or in a Slurm array; None if alone.

    Raises
    ------
    UsageError
        If half of it is said.
    """
    array = slurm_place(environ)
    asked = options.num_tasks is not None or options.task_index is not None
    if not asked:
        alone = options.method not in (None, "join") or options.index or options.runner != "local"
        return None if alone or options.overwrite else array
    if options.out is None:
        raise UsageError("--num_tasks needs --out, the folder that all processes share")
    count = options.num_tasks if options.num_tasks is not None else array and array.of
    index = options.task_index if options.task_index is not None else array and array.number
    if count is None or index is None:
        missing = "--num_tasks" if count is None else "--task_index"
        raise UsageError(
            f"--task_index I and --num_tasks N go together, I from 0; give {missing} too (a Slurm "
            "array sets both)"
        )
    return Place(index % count, count)


def slurm_place(environ: Mapping[str, str]) -> Place | None:
    """Return the place in a Slurm array, or None.

    Indices may begin anywhere and have steps or gaps: any number does, since a process that is done
    with its own tasks helps with others.
    """
    try:
        count = int(environ["SLURM_ARRAY_TASK_COUNT"])
        index = int(environ["SLURM_ARRAY_TASK_ID"]) - int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
        return Place(index // step % count, count)
    except (LookupError, ValueError, ZeroDivisionError):
        return None
