"""One run at a time: locks that end with the process that has them, and the work folder of a run.

The lock is the system's (``flock``): a file that a killed run left locks nothing. Each thread
counts as a run of its own. Where the system or the file system has no such locks (Windows, some
network mounts), every lock is granted, and users must start one run only.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from snipdedup.errors import SnipError
from snipdedup.storage.atomic import explained

WORK = "work"  # the folder of an unfinished run, removed at its end
REQUEST = "request.json"  # in the work: what was asked for
LOCK = "run.lock"  # in the work: one run at a time
CLAIM_LOCK = "claim.lock"  # in the work, for moments: who claims OUT, or puts a result there
CLAIM_S = 60.0  # to wait for another process that does


class ThreadLocks(threading.local):
    """The locks of this thread: an open file for each path."""

    def __init__(self) -> None:
        self.files: dict[Path, IO[bytes]] = {}


_own = ThreadLocks()


def lock(file: IO[bytes], shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where another run has it.

    ``shared`` locks exclude only those that are not shared.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a file system without locks
        return True
    return True


def acquire(path: Path, shared: bool = False) -> str | None:
    """Take the lock of a file, and make the file where it is missing.

    Returns who else has it; None where this thread has it now, or had it already. An `OSError` of
    writing the file is raised.
    """
    path = path.absolute()
    while not holds(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except FileNotFoundError:  # a run that ends just now removed the folder
            continue
        if not lock(file, shared):
            with file:
                return name_of_holder(file)
        if is_same(file, path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            _own.files[path] = file
        else:  # removed between opening and locking: a lock on nothing
            file.close()
    return None


def holder(path: Path, shared: bool = False) -> str | None:
    """Return who else has a lock, None where it could be taken; nothing is written."""
    if holds(path):
        return None
    try:
        with path.open("rb") as file:
            return None if lock(file, shared) else name_of_holder(file)
    except OSError:
        return None


def name_of_holder(file: IO[bytes]) -> str:
    """Return who has a lock, as its file says."""
    return file.read(200).decode(errors="replace") or "another process"


def holds(path: Path) -> bool:
    """Tell whether this thread has the lock of the file that lies at a path now."""
    file = _own.files.get(path.absolute())
    return file is not None and is_same(file, path)


def is_same(file: IO[bytes], path: Path) -> bool:
    """Tell whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def share(path: Path) -> None:
    """Make a lock of this thread a shared one."""
    lock(_own.files[path.absolute()], shared=True)


def remove(path: Path) -> None:
    """Remove a lock's file and release the lock, if this thread has it."""
    file = _own.files.pop(path.absolute(), None)
    if file is not None:
        try:
            path.unlink(missing_ok=True)  # first: who opens the file later locks a new one
        except PermissionError:  # Windows removes no open file
            file.close()
            path.unlink(missing_ok=True)
        file.close()


@contextmanager
def released() -> Iterator[None]:
    """Release at the end of the block, or of a decorated function, the locks taken in it."""
    before = set(_own.files)
    try:
        yield
    finally:
        for path in set(_own.files) - before:
            _own.files.pop(path).close()


@contextmanager
def claim_lock(out: Path) -> Iterator[None]:
    """Be the only process that claims OUT or puts a result there; wait for another one."""
    path, end = out / WORK / CLAIM_LOCK, time.monotonic() + CLAIM_S
    with explained(path):
        while (other := acquire(path)) is not None:
            if time.monotonic() > end:
                raise in_use(out, other)
            time.sleep(0.02)
    try:
        yield
    finally:
        remove(path)
        with suppress(OSError):  # missing, or not empty
            (out / WORK).rmdir()


def lock_run(out: Path, shared: bool = False) -> bool:
    """Lock OUT for this run, or for all processes that share it; tell whether it is alone.

    An OUT that another run has is refused.
    """
    path = out / WORK / LOCK
    with explained(path):
        other = acquire(path)
        alone = other is None
        if shared and not alone:
            other = acquire(path, shared)
    if other is not None:
        raise in_use(out, other)
    return alone


def in_use(out: Path, other: str) -> SnipError:
    """Return the refusal of an OUT that another run has."""
    return SnipError(
        f"--out {out} is being written by another run ({other}); wait for it, or choose "
        "another folder"
    )


def empty_work(out: Path) -> None:
    """Remove what is in the work, but its locks and the request, which says whose OUT is."""
    for path in (out / WORK).glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (REQUEST, LOCK, CLAIM_LOCK):
            path.unlink(missing_ok=True)


def end_work(out: Path) -> None:
    """Remove the work, and release the lock last."""
    empty_work(out)
    (out / WORK / REQUEST).unlink(missing_ok=True)
    brief = out / WORK / CLAIM_LOCK
    if brief.is_file() and acquire(brief) is None:
        remove(brief)  # before the other lock: by that, what a kill left is found
    remove(out / WORK / LOCK)
    with suppress(OSError):  # missing, or the next run's already
        (out / WORK).rmdir()
