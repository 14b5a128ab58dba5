"""Fetch one file: continued after breaks and across runs, checked, then renamed at once.

What came of an incomplete file lies beside its target as ``.NAME.part``, with a note of the version
that it is part of. A run that is killed at any byte continues from there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from snipdedup.errors import RangeError, SnipError, TemporaryError
from snipdedup.parallel import ordered_results
from snipdedup.storage import atomic, remote
from snipdedup.storage.remote import with_retries
from snipdedup.storage.web import CHUNK, Stream, Token, name_of, redacted

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SourceFile:
    """A file to fetch: a URL or local path, and what is known of its bytes.

    Checksums are in hex; ``git_sha1`` is that by which git names the file's contents.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    token: Token | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The file's name."""
        return name_of(self.url)

    @property
    def shown(self) -> str:
        """The location as messages and manifests may show it."""
        return redacted(self.url)

    def identity(self) -> dict[str, Any]:
        """Return what notes of this file hold."""
        return {"source": self.shown, "sha256": self.sha256, "git_sha1": self.git_sha1}


class Monitor:
    """What the transfers of a run share: one bar of bytes (`progress.bar`), an event that stops."""

    def __init__(self, bar: Any = None) -> None:
        self.bar, self.lock, self.stop = bar, threading.Lock(), threading.Event()
        self.positions: dict[Path, int] = {}
        self.sizes: dict[Path, int] = {}  # that the source did not tell before

    def expect(self, path: Path, size: int) -> None:
        """Add the size of a file to the bar, once it is known."""
        with self.lock:
            if self.bar is not None:
                self.bar.total += size - self.sizes.get(path, 0)
            self.sizes[path] = size

    def report(self, path: Path, position: int) -> None:
        """Note that the first bytes of a file are here; fewer than before if it begins anew."""
        if self.stop.is_set():
            raise SnipError("stopped: another transfer of the run failed")
        with self.lock:
            moved = position - self.positions.get(path, 0)
            self.positions[path] = position
            if self.bar is not None and moved:
                self.bar.update(moved)

    def pause(self, seconds: float, reason: str) -> None:
        """Wait, and show why."""
        for text, wait in ((f"waiting {seconds:.0f} s: {reason}", seconds), ("", 0)):
            with self.lock:
                if self.bar is not None:
                    self.bar.set_postfix_str(text)
            if self.stop.wait(wait):
                raise SnipError("stopped: another transfer of the run failed")

    def map(
        self, work: Callable[[T], R], items: Iterable[T], jobs: int
    ) -> Generator[R, None, None]:
        """Yield ``work(item)`` in order, ``jobs`` at a time.

        At the first failure the other transfers stop; what they fetched is kept. At most twice
        as many items as ``jobs`` are under way or not yet taken, so a slow caller fills no disk.
        """
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield from ordered_results(work, items, pool, 2 * jobs)
            finally:
                self.stop.set()


class PartFile:
    """What has come of a file, and a note of the version that it is part of."""

    def __init__(self, file: SourceFile, target: Path, monitor: Monitor) -> None:
        self.file, self.target, self.monitor = file, target, monitor
        self.path = target.with_name(f".{target.name}.part")
        self.note = target.with_name(f".{target.name}.part.json")
        self.joined = False  # whether it was continued: its bytes came by several requests

    def size(self) -> int:
        """Return how many bytes are here."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def remove(self) -> None:
        """Remove part and note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.joined = False

    def fetch(self) -> dict[str, Any]:
        """Fetch the missing bytes, and check all; return size and etag.

        A part is continued only if a checksum will prove it at the end, or if the source still has
        the named version that it is part of.
        """
        file, note = self.file, {}
        proved = bool(file.sha256 or file.git_sha1)
        with suppress(SnipError, TypeError, ValueError):  # none, or damaged
            note = dict(atomic.load_json(self.note))
        is_same = file.identity().items() <= note.items()
        begin = self.size() if is_same and (proved or note.get("etag")) else 0
        self.joined |= begin > 0
        etag = note.get("etag") if begin else None
        whole = file.size if file.size is not None else note.get("total")
        if not begin or begin != whole:  # else it was stopped just before it was renamed
            stream = remote.open_stream(file.url, begin, None if proved else etag, file.token)
            total = stream.total if stream.total is not None else file.size
            if file.size is not None and total != file.size:
                text = f"{file.shown}: expected {file.size:,} bytes, the source has {total:,}"
                raise SnipError(f"{text}; it was replaced: run again")
            known = etag, note.get("total")
            if stream.begin and not proved and (stream.version, total) != known:
                raise RangeError(f"{file.shown} was replaced while it was fetched")
            if file.size is None and total is not None:
                self.monitor.expect(self.target, total)
            etag = stream.version or None
            if not stream.begin:
                self.remove()
                atomic.save_json(self.note, {**file.identity(), "etag": etag, "total": total})
            self.append(stream)
        self.monitor.report(self.target, self.size())
        self.check(self.size())
        return {"size": self.size(), "etag": etag}

    def append(self, stream: Stream) -> None:
        """Write what comes behind the bytes that are here."""
        position = stream.begin
        with (
            atomic.explained(self.target),
            self.path.open("ab") as out,
        ):  # reading raises no OSError
            for chunk in stream.chunks:
                self.monitor.report(self.target, position)
                out.write(chunk)
                out.flush()  # so that a kill loses little
                position += len(chunk)
            os.fsync(out.fileno())

    def check(self, size: int) -> None:
        """Compare size and checksum with those that the source promised."""
        file = self.file
        if file.size is not None and size != file.size:
            kind = TemporaryError if size < file.size else RangeError
            raise kind(f"{file.shown}: expected {file.size:,} bytes, {size:,} came; run again")
        promised = ("sha256", file.sha256, atomic.sha256), ("git_sha1", file.git_sha1, git_sha1)
        for name, expected, digest in promised:
            if expected is not None and (found := digest(self.path)) != expected:
                raise RangeError(
                    f"{file.shown}: wrong checksum: expected {name} {expected}, found {found}; run "
                    "again, or ask who publishes it"
                )


def fetch_once(file: SourceFile, target: Path, monitor: Monitor) -> dict[str, Any]:
    """Return what `fetch_file` does; a file that an earlier run fetched is not fetched again.

    A done file beside the target tells that it is this file, and that it was not damaged since.
    """
    done_file = done_file_of(target)
    about = atomic.read_done(done_file, target.parent)
    if about is not None and file.identity().items() <= about.items():
        monitor.report(target, about["size"])
        return {"size": about["size"], "etag": about["etag"]}
    target.unlink(missing_ok=True)
    about = fetch_file(file, target, monitor)
    atomic.write_done_file(done_file, [target], {**file.identity(), **about})
    return about


def done_file_of(target: Path) -> Path:
    """Return the done file of a file that was fetched."""
    return target.with_name(f".{target.name}.done.json")


def fetch_file(file: SourceFile, target: Path, monitor: Monitor | None = None) -> dict[str, Any]:
    """Fetch a file to ``target``, complete and checked, or not at all; return size and etag.

    What was fetched before a `TemporaryError` is kept. The etag is None where the source has none.
    """
    part = PartFile(file, target, monitor or Monitor())
    while True:
        try:
            about = with_retries(part.fetch, part.monitor.pause, part.size)
            break
        except RangeError:
            joined = part.joined
            part.remove()
            if not joined:  # pieces of several requests are fetched once more, in one
                raise
    with atomic.explained(target):
        part.path.replace(target)
        part.note.unlink(missing_ok=True)
    return about


def git_sha1(path: Path) -> str:
    """Return the SHA-1 by which git names a file's contents."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
