"""Progress on stderr (a bar on a terminal, plain lines elsewhere), and the time of each stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

PLAIN_LINES_EVERY_S = 10.0


def bar(total: int, desc: str, unit: str) -> Any:
    """Return a progress bar, a context manager with ``update(n)`` and ``set_postfix_str``."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # here: most runs have no terminal, or print nothing

        return tqdm(total=total, desc=desc, unit=" " + unit, unit_scale=True, file=sys.stderr)
    return PlainBar(total, desc, unit)


def say(text: str) -> None:
    """Print a line to stderr, above a bar if there is one."""
    from tqdm import tqdm

    with suppress(BrokenPipeError):  # nobody reads stderr any more (``2>&1 | head``)
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def track(items: Iterable[T], desc: str, unit: str, total: int) -> Iterator[T]:
    """Yield from ``items`` while a bar counts them."""
    with bar(total, desc, unit) as progress:
        for item in items:
            yield item
            progress.update(1)


class PlainBar:
    """Progress for log files: one line now and then, none for short work."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = 0
        self.started = self.last_line = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more units; print a line if the last one is old enough."""
        self.done += n
        now = time.monotonic()
        if now - self.last_line < PLAIN_LINES_EVERY_S:
            return
        self.last_line = now
        rate = self.done / (now - self.started)
        left = max(0, self.total - self.done) / rate if rate else float("inf")
        say(
            f"{self.desc}: {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f} {self.unit}/s, {left:,.0f} s left"
        )

    def set_postfix_str(self, text: str) -> None:
        """Show ``text`` (a loss, say) behind the bar's description."""
        self.desc = self.desc.split(" [")[0] + (f" [{text}]" if text else "")

    def __enter__(self) -> PlainBar:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to tidy up: lines stay printed."""


class Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
