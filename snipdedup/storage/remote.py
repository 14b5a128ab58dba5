"""A file elsewhere that is read in place: ranges of bytes, many in flight, each asked for again.

An `RemotePath` stands where paths stand, so that what names, sorts and describes files need not
know. Its size and what names its version are asked for once; a range of another one is refused.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from snipdedup.errors import InputError, SnipError
from snipdedup.storage.urls import (
    MissingError,
    RangeError,
    TemporaryError,
    is_web,
    name_of,
    redacted,
    scheme_of,
)

T = TypeVar("T")

PART = 4 << 20  # bytes of one request
FLIGHTS = 16  # requests in flight: they wait for the network, not for a core
ATTEMPTS = 6  # of one request
BACKOFF_S = 0.5  # doubled each time
BUFFER = 1 << 16  # read at once where headers and footers are read
NO_RANGES = "the server sends whole files only: fetch it first with snip download, or by hand"
# What stores call the version of a file; the first that is there is taken.
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified",
            "last_modified", "updated", "modified", "created")  # fmt: skip
BASE: Any = type(Path())


class Known(NamedTuple):
    """Size of a file, and a text that changes when the file does; empty where nothing tells."""

    size: int
    version: str


class RemotePath(BASE):
    """A URL as a path. What a URL may hide (a password, a signed query) is in ``url`` only."""

    def __new__(cls, url: str) -> RemotePath:
        """Make a path of what messages may show."""
        return super().__new__(cls, redacted(url))

    def __init__(self, url: str) -> None:
        if sys.version_info >= (3, 12):
            super().__init__(redacted(url))
        self.url = url
        self._known: Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    def __str__(self) -> str:
        return redacted(self.url)

    def __fspath__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The file's name."""
        return name_of(self.url)

    @property
    def parent(self) -> RemotePath:
        """The folder that it lies in."""
        head, _, _ = redacted(self.url).rpartition("/")
        return RemotePath(head)

    def resolve(self, strict: bool = False) -> RemotePath:
        """Return this: it is the same from anywhere."""
        del strict
        return self

    def absolute(self) -> RemotePath:
        """Return this."""
        return self

    def expanduser(self) -> RemotePath:
        """Return this."""
        return self

    def is_dir(self) -> bool:
        """Return False: only files are made of URLs."""
        return False

    def is_file(self) -> bool:
        """Tell whether it is there; what hinders to know is raised."""
        try:
            return self.known() is not None
        except MissingError:
            return False

    exists = is_file

    def known(self) -> Known:
        """Return size and version as they were when it was looked at first."""
        if self._known is None:
            self._known = with_retries(lambda: look(self.url))
        return self._known

    def forget(self) -> None:
        """Look again when it is asked next."""
        self._known = None

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return the entries of a stat that tell a file from another."""
        del follow_symlinks
        size, version = self.known()
        stamp = int.from_bytes(hashlib.sha256(version.encode()).digest()[:7], "big")
        return os.stat_result((0, stamp, 0, 0, 0, 0, size, 0, 0, 0), {"st_mtime_ns": stamp})

    def open(self, *given: Any, **named: Any) -> IO[bytes]:
        """Open it for reading at any place."""
        del given, named
        return io.BufferedReader(Reader(self), BUFFER)

    def fetch(self, begin: int, end: int) -> bytes:
        """Return the bytes ``begin`` to ``end`` (exclusive), in one request.

        Raises
        ------
        InputError
            If the file is another one by now.
        TemporaryError
            If it failed `ATTEMPTS` times.
        """
        if begin >= end:
            return b""
        known = self.known()
        return with_retries(lambda: ask(self.url, begin, end, known))

    def read_range(self, begin: int, end: int) -> bytes:
        """Return the bytes ``begin`` to ``end``, in as many requests as are worth it."""
        if end - begin <= PART:
            return self.fetch(begin, end)
        spans = [(at, min(at + PART, end)) for at in range(begin, end, PART)]
        return b"".join(self.read_ranges(spans))

    def read_ranges(self, spans: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each (begin, end), in order, several requests under way."""
        waiting: deque[Future[bytes]] = deque()
        pool = flights(os.getpid())
        try:
            for begin, end in spans:
                waiting.append(pool.submit(self.fetch, begin, end))
                if len(waiting) >= 2 * FLIGHTS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Reader(io.RawIOBase):
    """An `RemotePath` as an open file."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.at, self.size = path, 0, path.known().size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        """Return the place."""
        return self.at

    def readinto(self, out: Any) -> int:
        """Fill ``out`` with what comes at the place; short at the end only."""
        data = self.path.read_range(self.at, min(self.at + len(out), self.size))
        out[: len(data)] = data
        self.at += len(data)
        return len(data)


@functools.cache
def flights(process: int) -> ThreadPoolExecutor:
    """Return the threads that ask, by process: a forked one has none of its parent's."""
    del process
    return ThreadPoolExecutor(FLIGHTS, thread_name_prefix="snip-range")


def with_retries(work: Callable[[], T]) -> T:
    """Return ``work()``, tried again, with longer and longer waits, after temporary faults."""
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except RangeError:
            raise
        except TemporaryError as error:
            wait = BACKOFF_S * 2 ** (attempt - 1) * (0.5 + random.random())
            time.sleep(wait if error.wait is None else min(error.wait, 60.0))
    try:
        return work()
    except RangeError:
        raise
    except TemporaryError as error:
        raise TemporaryError(f"{error} (tried {ATTEMPTS} times)") from error


def map_requests(work: Callable[[Any], T], paths: Iterable[Any]) -> list[T]:
    """Return ``work(path)`` of each, in order, asked for at the same time."""
    with ThreadPoolExecutor(FLIGHTS) as pool:  # its own: the work may wait for `flights`
        return list(pool.map(work, paths))


def is_remote(location: object) -> bool:
    """Tell a URL from a path."""
    return isinstance(location, RemotePath) or (
        isinstance(location, str) and bool(scheme_of(location))
    )


def absolute_location(location: str | Path) -> str:
    """Return a path as it is from anywhere, a URL as manifests may show it."""
    if is_remote(location):
        return redacted(str(location))
    return str(Path(location).expanduser().absolute())


def arrow_source(path: Path) -> Any:
    """Return what pyarrow reads: a path as it is, of an `RemotePath` an open file."""
    return path.open("rb") if isinstance(path, RemotePath) else path


# ---- what servers and stores are asked


def look(url: str) -> Known:
    """Ask for size and version; refuse what cannot be read by ranges.

    Raises
    ------
    MissingError, TemporaryError, SnipError
        If it is not there, cannot be reached, or must not be read.
    """
    return look_web(url) if is_web(url) else look_store(url)


def look_web(url: str) -> Known:
    """Ask a web server, by the first byte of a file."""
    from snipdedup.storage import http

    try:
        response = http.get(url, "0-0")
    except RangeError as error:
        raise InputError(f"{redacted(url)}: empty file, or {NO_RANGES}") from error
    with response:
        if response.status != 206:
            raise SnipError(f"{redacted(url)}: cannot be read in parts: {NO_RANGES}")
        _, _, total = http.content_range(response, url)
        return Known(total, web_version(response))


def web_version(response: Any) -> str:
    """Return what a response says of the version that it is of."""
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def look_store(url: str) -> Known:
    """Ask a store that fsspec knows."""
    from snipdedup.storage import buckets

    with buckets.explained(url):
        system, path = buckets.filesystem(url)
        system.invalidate_cache()
        info = system.info(path)
    if info.get("type") == "directory" or info.get("size") is None:
        raise MissingError(f"{redacted(url)}: expected a file, found a folder")
    named = [f"{info[name]}" for name in VERSIONS if info.get(name)]
    return Known(int(info["size"]), named[0] if named else "")


def ask(url: str, begin: int, end: int, known: Known) -> bytes:
    """Ask once for the bytes ``begin`` to ``end`` of the version that is known."""
    data = ask_web(url, begin, end, known) if is_web(url) else ask_store(url, begin, end)
    if len(data) != end - begin:
        raise TemporaryError(
            f"{redacted(url)}: bytes {begin:,} to {end:,} were asked for, {len(data):,} came"
        )
    return data


def ask_web(url: str, begin: int, end: int, known: Known) -> bytes:
    """Ask a web server."""
    from snipdedup.storage import http

    response = http.get(url, f"{begin}-{end - 1}")
    if response.status != 206:
        response.close()
        raise SnipError(f"{redacted(url)}: cannot be read in parts: {NO_RANGES}")
    first, last, total = http.content_range(response, url)
    if Known(total, web_version(response)) != known:
        response.close()
        raise InputError(f"{redacted(url)}: changed while it was read; run it again")
    if (first, last) != (begin, end - 1):
        response.close()
        raise RangeError(
            f"{redacted(url)}: bytes {begin}-{end - 1} were asked, {first}-{last} came"
        )
    return b"".join(http.chunks(response, url))


def ask_store(url: str, begin: int, end: int) -> bytes:
    """Ask a store that fsspec knows; it was there, so what fails now may be well again soon."""
    from snipdedup.storage import buckets

    with buckets.explained(url):
        system, path = buckets.filesystem(url)
        try:
            return bytes(system.cat_file(path, start=begin, end=end))
        except (OSError, SnipError):
            raise
        except Exception as error:  # a connection lost has as many names as there are stores
            raise TemporaryError(
                f"{redacted(url)}: cannot be read: {type(error).__name__}: {error}"
            ) from error
