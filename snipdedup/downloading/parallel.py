"""Several transfers at a time, handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from snipdedup.downloading import transfer
from snipdedup.downloading.transfer import Watch
from snipdedup.storage.urls import Remote

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    work: Callable[[T], R], items: Iterable[T], jobs: int, watch: Watch
) -> Generator[R, None, None]:
    """Yield ``work(item)`` in the order of ``items``, ``jobs`` at a time.

    At the first failure the others are told by ``watch`` to stop; what came of their files stays.
    Twice as many as ``jobs`` are under way or not yet taken, so a slow taker fills no disk.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            watch.stop.set()
            for future in waiting:
                future.cancel()


def fetch_each(
    tasks: Sequence[tuple[Remote, Path]], jobs: int, watch: Watch
) -> Iterator[dict[str, Any]]:
    """Bring files to their places; yield what `landing.save` says of each, in order."""

    def fetch(task: tuple[Remote, Path]) -> dict[str, Any]:
        return transfer.save(*task, watch)

    return side_by_side(fetch, tasks, jobs, watch)
