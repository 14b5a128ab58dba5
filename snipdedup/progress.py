"""Progress on stderr, never silent for long, and the time of each stage.

On a terminal a bar counts work, and where nothing counts, a line says what goes on and since when.
A thread draws both anew twice a second, so they move while one long step runs. Elsewhere, in a log
file say, a line comes every ten seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

BEAT_S = 0.5
PLAIN_LINES_EVERY_S = 10.0
QUIET, USUAL, VERBOSE = range(3)
CLEAR = "\r\x1b[K"  # to the line's begin; erase it

loudness = USUAL  # as the command line asks: QUIET shows nothing here, VERBOSE each stage's end
_shown: list[Any] = []  # bars and phases that go on, the outer ones first
_lock = threading.RLock()
_beating: list[tuple[threading.Event, threading.Thread]] = []  # of the thread that draws
if hasattr(os, "register_at_fork"):  # a forked process must not begin with a lock that is held
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def bar(total: int, desc: str, unit: str) -> Any:
    """Return a progress bar, a context manager with ``update(n)`` and ``set_postfix_str``."""
    if loudness != QUIET and (sys.stderr.isatty() or in_notebook()):
        # here: most runs have no terminal, or print nothing; a bar of a notebook is made of widgets
        from tqdm.auto import tqdm

        shown: Any = tqdm(
            total=total, desc=desc, unit=" " + unit, unit_scale=True, file=sys.stderr, delay=1e-9
        )
    else:
        shown = PlainBar(total, desc, unit)
    return showing(shown)


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def phase(desc: str) -> Iterator[None]:
    """Say what goes on and since when, while no bar and no inner phase is shown."""
    with showing(Phase(desc)):
        yield


@contextmanager
def showing(shown: Any) -> Iterator[Any]:
    """Draw something anew from time to time while a block runs; it is drawn once, and closed."""
    with _lock:
        hide()
        _shown.append(shown)
        if not _beating:
            ended = threading.Event()
            _beating.append((ended, threading.Thread(target=beat, args=(ended,), daemon=True)))
            _beating[0][1].start()
    with shown:
        try:
            shown.refresh()
            yield shown
        finally:  # before it is closed, so that it is not drawn any more
            last = []
            with _lock:
                _shown[:] = [one for one in _shown if one is not shown]
                if not _shown:
                    last.append(_beating.pop())
                elif isinstance(_shown[-1], Phase):  # a line in a log file once there is news
                    _shown[-1].last_line = time.monotonic()
            for ended, thread in last:
                ended.set()
                thread.join()


def beat(ended: threading.Event) -> None:
    """Draw all bars anew, and a phase if it is the innermost, until the work ends."""
    while not ended.wait(BEAT_S):
        with _lock:
            for shown in _shown:
                if not isinstance(shown, Phase) or shown is _shown[-1]:
                    shown.refresh()


def hide() -> None:
    """Erase the line of the innermost phase."""
    if _shown and isinstance(_shown[-1], Phase):
        _shown[-1].erase()


def say(text: str) -> None:
    """Print a line to stderr, above a bar if there is one."""
    from tqdm import tqdm

    with suppress(BrokenPipeError), _lock:  # nobody reads stderr any more (``2>&1 | head``)
        hide()
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def track(items: Iterable[T], desc: str, unit: str, total: int) -> Iterator[T]:
    """Yield from ``items`` while a bar counts them."""
    with bar(total, desc, unit) as progress:
        for item in items:
            yield item
            progress.update(1)


class Phase:
    """A line that says what goes on, and for how long."""

    def __init__(self, desc: str) -> None:
        self.desc, self.drawn = desc, False
        self.started = self.last_line = time.monotonic()

    def refresh(self) -> None:
        """Draw the line, from the first beat on; print one now and then where no terminal is."""
        now = time.monotonic()
        text = f"{self.desc}: {now - self.started:,.0f} s"
        if loudness == QUIET or now - self.started < BEAT_S / 2:
            return
        if sys.stderr.isatty():
            sys.stderr.write(f"{CLEAR}{text}")
            sys.stderr.flush()
            self.drawn = True
        elif now - self.last_line >= PLAIN_LINES_EVERY_S:
            self.last_line = now
            say(text)

    def erase(self) -> None:
        """Take the line away."""
        if self.drawn:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()
            self.drawn = False

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *exc: object) -> None:
        self.erase()


class PlainBar:
    """Progress for log files: one line now and then, none for short work."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = 0
        self.started = self.last_line = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more units."""
        self.done += n
        self.refresh()

    def refresh(self) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if loudness == QUIET or now - self.last_line < PLAIN_LINES_EVERY_S:
            return
        self.last_line = now
        rate = self.done / (now - self.started)
        left = f"{max(0, self.total - self.done) / rate:,.0f} s left" if rate else "not yet timed"
        say(
            f"{self.desc}: {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f} {self.unit}/s, {left}"
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
            with phase(name):
                yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            if loudness == VERBOSE:
                say(f"{name}: {spent:,.2f} s")
