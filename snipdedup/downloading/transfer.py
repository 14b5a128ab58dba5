"""Bringing one remote file to the disk: in pieces if need be, across runs, proved, then renamed.

What came of a file that is not whole yet lies beside its place as ``.NAME.part``, with a note of
the version it belongs to. A run that is killed at any byte goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from snipdedup.errors import SnipError
from snipdedup.storage import atomic, buckets, http, locks
from snipdedup.storage.urls import CHUNK, RangeError, Remote, Stream, TemporaryError, is_web

T = TypeVar("T")

ATTEMPTS = 6  # in a row that bring no byte
BACKOFF_S = 1.0  # doubled each time
MAX_WAIT_S = 600.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoppedError(SnipError):
    """Another transfer of the same run failed, so this one was given up."""


class ChecksumError(SnipError):
    """The bytes are not those that were promised."""


class Watch:
    """What transfers share: one bar of bytes, and word to stop."""

    def __init__(self, bar: Any = None) -> None:
        self.bar, self.lock, self.stop = bar, threading.Lock(), threading.Event()
        self.places: dict[Path, int] = {}

    def expect(self, size: int) -> None:
        """Count ``size`` more bytes to come."""
        with self.lock:
            if self.bar is not None:
                self.bar.total += size

    def at(self, path: Path, place: int) -> None:
        """Note that the first ``place`` bytes of a file are here; may fall where it begins anew."""
        if self.stop.is_set():
            raise StoppedError("stopped")
        with self.lock:
            moved = place - self.places.get(path, 0)
            self.places[path] = place
            if self.bar is not None and moved:
                self.bar.update(moved)

    def pause(self, seconds: float, why: str) -> None:
        """Wait, and say so."""
        self.say(f"waiting {seconds:.0f} s: {why}")
        if self.stop.wait(seconds):
            raise StoppedError("stopped")
        self.say("")

    def say(self, text: str) -> None:
        """Show a text at the bar."""
        with self.lock:
            if self.bar is not None:
                self.bar.set_postfix_str(text)


class Part:
    """What has come of a file so far, and the version that it is a part of."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self.note = target.with_name(f".{target.name}.part.json")

    def size(self) -> int:
        """Return how many bytes are here."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> dict[str, Any]:
        """Return what the note says; nothing where it cannot be read."""
        try:
            return dict(atomic.load_json(self.note))
        except (SnipError, TypeError, ValueError):
            return {}

    def drop(self) -> None:
        """Forget what came."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Yield the file to write to; one process at a time may."""
        with atomic.explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab")
        try:
            if not locks.lock(file):
                raise SnipError(f"{self.target} is being fetched by another run; wait for it")
            yield file
        finally:
            with suppress(OSError):  # what could not be written cannot be flushed either: said
                file.close()

    def finish(self) -> None:
        """Put the file in its place."""
        with atomic.explained(self.target):
            self.path.replace(self.target)
            self.note.unlink(missing_ok=True)


def save(remote: Remote, path: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Bring a file to ``path``: whole and proved, or not at all.

    Parameters
    ----------
    remote : Remote
        Its size and checksum are checked where they are known.
    path : Path
    watch : Watch, optional

    Returns
    -------
    dict
        ``size``, ``etag`` (what names the version, where there is such a thing).

    Raises
    ------
    TemporaryError
        If it failed `ATTEMPTS` times in a row without bringing a byte; what came stays.
    SnipError
        If trying again is of no use.
    """
    watch = watch or Watch()
    part = Part(path)
    failures = 0
    while True:
        had = part.size()
        try:
            told = receive(remote, part, watch)
            check(remote, part, told["size"])
            break
        except ChecksumError:  # of pieces: once more, from the beginning
            part.drop()
            if not had:
                raise
        except TemporaryError as error:
            failures = 1 if part.size() > had else failures + 1
            if isinstance(error, RangeError):  # what stands here does not fit what is there now
                part.drop()
            wait_for(error, failures, watch)
    part.finish()
    return told


def patiently(work: Callable[[], T], watch: Watch | None = None) -> T:
    """Return ``work()``, tried again after temporary faults."""
    watch, failures = watch or Watch(), 0
    while True:
        try:
            return work()
        except TemporaryError as error:
            failures += 1
            wait_for(error, failures, watch)


def wait_for(error: TemporaryError, failures: int, watch: Watch) -> None:
    """Wait before another try; raise the error where it failed often enough, or for too long."""
    wait = error.wait
    if wait is None:  # longer each time, never the same twice
        wait = BACKOFF_S * 2.0 ** (failures - 1) * (0.5 + random.random())
    if failures >= ATTEMPTS or wait > MAX_WAIT_S:
        raise error
    watch.pause(wait, str(error))


def receive(remote: Remote, part: Part, watch: Watch) -> dict[str, Any]:
    """Fetch what is missing of a file."""
    begin, version = continued(remote, part)
    whole = remote.size if remote.size is not None else version.get("total")
    if begin == whole and part.path.is_file():  # stopped just before it was renamed
        watch.at(part.target, begin)
        return {"size": begin, "etag": version.get("etag")}
    opener = http.open_at if is_web(remote.url) else buckets.open_at
    stream = opener(remote, begin, None if is_proved(remote) else version.get("etag"))
    total = stream.total if stream.total is not None else remote.size
    refuse_other(remote, version, stream, total)
    if whole is None and total is not None:
        watch.expect(total)
    refuse_full_disk(part, (total or 0) - stream.begin)
    with part.open() as file:
        if not stream.begin:
            file.truncate(0)
            atomic.save_json(part.note, {**named(remote), "etag": stream.validator, "total": total})
        watch.at(part.target, stream.begin)
        write(stream.chunks, file, part, watch)
    return {"size": part.size(), "etag": stream.validator}


def refuse_other(
    remote: Remote, version: dict[str, Any], stream: Stream, total: int | None
) -> None:
    """Refuse a file that is not the one that was listed, or not the one that was begun."""
    if remote.size is not None and total != remote.size:
        raise SnipError(
            f"{remote.shown}: expected {remote.size:,} bytes, the other side has {total:,}; it was "
            "replaced, or its list of files is wrong: ask who publishes it"
        )
    if stream.begin and not is_proved(remote):
        found = {"etag": stream.validator, "total": total}
        if found != {name: version.get(name) for name in found}:  # an If-Range that was not heard
            raise RangeError(f"{remote.shown} was replaced while it was fetched")


def is_proved(remote: Remote) -> bool:
    """Tell whether a checksum will prove the file, whatever pieces it came in."""
    return bool(remote.sha256 or remote.git_sha1)


def named(remote: Remote) -> dict[str, Any]:
    """Return what must be the same for a part to be gone on with."""
    return {"source": remote.shown, "sha256": remote.sha256, "git_sha1": remote.git_sha1}


def continued(remote: Remote, part: Part) -> tuple[int, dict[str, Any]]:
    """Return from which byte to go on, and the version that the bytes before it belong to.

    Only what can be proved to be of one version is gone on with: by a checksum at the end, or by
    the name of the version that the other side gave.
    """
    version = part.version()
    if {name: version.get(name) for name in named(remote)} != named(remote):
        return 0, {}
    known = is_proved(remote) or bool(version.get("etag"))
    return (part.size(), version) if known else (0, {})


def write(chunks: Iterator[bytes], file: IO[bytes], part: Part, watch: Watch) -> None:
    """Append what comes."""
    place = file.tell()
    for chunk in chunks:  # what fails there is of reading, and says so itself
        try:
            file.write(chunk)
        except OSError as error:
            raise cannot_write(part, error) from error
        place += len(chunk)
        watch.at(part.target, place)
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(part, error) from error


def refuse_full_disk(part: Part, need: int) -> None:
    """Refuse to begin what cannot end."""
    part.path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part.path.parent).free
    if need > free:
        raise SnipError(
            f"the disk is full: {part.target} needs {need:,} more bytes, {free:,} are free; make "
            "room and run again: what is complete is kept"
        )


def cannot_write(part: Part, error: OSError) -> SnipError:
    """Return the refusal of a write."""
    if error.errno in FULL:
        return SnipError(
            f"the disk is full: cannot write {part.target}; make room and run again: what is "
            "complete is kept"
        )
    return atomic.cannot_write(part.target, error)


def check(remote: Remote, part: Part, size: int) -> None:
    """Compare what came with what was promised."""
    if remote.size is not None and size != remote.size:
        kind = TemporaryError if size < remote.size else ChecksumError
        raise kind(f"{remote.shown}: expected {remote.size:,} bytes, {size:,} came; run again")
    for name, wanted in (("sha256", remote.sha256), ("git_sha1", remote.git_sha1)):
        if wanted is None:
            continue
        found = atomic.sha256(part.path) if name == "sha256" else git_sha1(part.path)
        if found != wanted:
            raise ChecksumError(
                f"{remote.shown}: wrong checksum: {name} {wanted} was promised, {found} came; it "
                "was damaged on the way or replaced: run again, and if it stays ask who publishes "
                "it"
            )


def git_sha1(path: Path) -> str:
    """Return a file's name as a git blob."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
