"""One run at a time: a lock that goes with the process that holds it, killed or not.

The lock is the system's (``flock``), not the file's existence: a file that a killed run left locks
nothing. Each thread counts as a run of its own. Where the system or the file system knows no such
locks (Windows, some network mounts), there is none, and it is up to the user to start one run only.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Held(threading.local):
    """The locks of this thread: an open file for each path."""

    def __init__(self) -> None:
        self.files: dict[Path, IO[bytes]] = {}


_held = Held()


def lock(file: IO[bytes], shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where another run has it.

    ``shared`` locks keep out only those that are not.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def take(path: Path, shared: bool = False) -> str | None:
    """Take the lock that a file stands for, and make the file where it is missing.

    Taking a lock that this thread has already is no harm.

    Returns
    -------
    str or None
        Who else has it; None where it is taken.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path = path.absolute()
    while not is_same(_held.files.get(path), path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except FileNotFoundError:  # the run that ends just now removed the folder
            continue
        if not lock(file, shared):
            with file:
                return file.read(200).decode(errors="replace") or "another process"
        if is_same(file, path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            _held.files[path] = file
        else:  # removed between opening and locking: a lock on nothing
            file.close()
    return None


def who_has(path: Path, shared: bool = False) -> str | None:
    """Return who else has a lock, None where it could be taken; nothing is written."""
    if holds(path):
        return None
    try:
        with path.open("rb") as file:
            if lock(file, shared):
                return None
            return file.read(200).decode(errors="replace") or "another process"
    except OSError:
        return None


def share(path: Path) -> None:
    """Let others have a lock too that this thread has alone."""
    file = _held.files.get(path.absolute())
    if file is not None:
        lock(file, shared=True)


def holds(path: Path) -> bool:
    """Tell whether this thread has the lock that the file at a path stands for now."""
    path = path.absolute()
    return is_same(_held.files.get(path), path)


def is_same(file: IO[bytes] | None, path: Path) -> bool:
    """Tell whether an open file is the one that lies at a path."""
    try:
        return file is not None and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a lock's file and give up the lock, if this thread has it."""
    path = path.absolute()
    file = _held.files.pop(path, None)
    if file is not None:
        path.unlink(missing_ok=True)  # first: who opens the file later locks a new one
        file.close()


@contextmanager
def given_up() -> Iterator[None]:
    """Give up, when the block ends, the locks that were taken in it.

    As a decorator, those that a function took: ``@given_up()``.
    """
    before = set(_held.files)
    try:
        yield
    finally:
        for path in set(_held.files) - before:
            _held.files.pop(path).close()
