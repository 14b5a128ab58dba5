"""Remote files: size and version, reads by ranges of bytes with retries, streams from a position.

http(s) URLs are read by `snipdedup.storage.web`, all others by fsspec (``s3://``, ``gs://``,
``hf://``, ``memory://``; paths of this machine too). A range of another version than the one that
was seen first is refused.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from snipdedup.errors import InputError, MissingError, RangeError, SnipError, TemporaryError
from snipdedup.parallel import ordered_results
from snipdedup.storage import web
from snipdedup.storage.web import AGAIN, FileVersion, Stream, Token, is_web, redacted, scheme_of

T = TypeVar("T")
R = TypeVar("R")

RANGE_BYTES = 4 << 20  # of one request
REQUESTS = 16  # at a time: they wait for the network, not for a core
GAP_BYTES = 1 << 15  # between wanted rows: fewer cost less than another request
BUFFER_BYTES = 1 << 16  # read at a time where headers and footers are read
ATTEMPTS = 6  # in a row without progress
BACKOFF_S = 1.0  # before the second attempt; doubled each time
MAX_WAIT_S = 600.0
# What stores call the version of a file; the first that is there is taken.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "generation", "mtime",
                "LastModified", "last_modified", "updated", "modified", "created")  # fmt: skip
PATH: Any = type(Path())


def with_retries(
    work: Callable[[], T],
    pause: Callable[[float, str], object] = lambda seconds, reason: time.sleep(seconds),
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Return ``work()``; after a `TemporaryError` wait, and try again.

    ``pause`` waits some seconds for a reason. ``progress`` returns how many bytes are done: the
    last error is raised after `ATTEMPTS` in a row that brought none, or if the server asks to wait
    longer than `MAX_WAIT_S`.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return work()
        except TemporaryError as error:
            failures = 1 if progress() > before else failures + 1
            wait = error.wait
            if wait is None:
                wait = BACKOFF_S * 2 ** (failures - 1) * (0.5 + random.random())
            if failures >= ATTEMPTS or wait > MAX_WAIT_S:
                raise TemporaryError(f"{error} (tried {failures} times)", error.wait) from error
            pause(wait, str(error))


class RemotePath(PATH):
    """The URL of a file as a path: its text is the redacted URL, all of it is in ``url`` only."""

    def __new__(cls, url: str, token: Token | None = None) -> RemotePath:  # noqa: D102
        del token
        return super().__new__(cls, redacted(url))

    def __init__(self, url: str, token: Token | None = None) -> None:
        if sys.version_info >= (3, 12):
            super().__init__(redacted(url))
        self.url, self._token = url, token
        self._version: FileVersion | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    def __str__(self) -> str:
        return redacted(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The file's name."""
        return web.name_of(self.url)

    @property
    def parent(self) -> RemotePath:
        """The folder that it lies in."""
        return RemotePath(redacted(self.url).rpartition("/")[0])

    def absolute(self) -> RemotePath:
        """Return this path: a URL is the same from anywhere."""
        return self

    resolve = expanduser = absolute

    def is_dir(self) -> bool:
        """Return False: remote paths are files."""
        return False

    def is_file(self) -> bool:
        """Tell whether the file exists; other faults than a missing file are raised."""
        try:
            return self.version() is not None
        except MissingError:
            return False

    exists = is_file

    def version(self) -> FileVersion:
        """Return size and version as they were at the first request."""
        if self._version is None:
            self._version = with_retries(lambda: read_version(self.url, self._token))
        return self._version

    def forget_version(self) -> None:
        """Request size and version again when they are needed next."""
        self._version = None

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return a stat whose size, inode and time of change tell this version from others."""
        del follow_symlinks
        size, version = self.version()
        stamp = int.from_bytes(hashlib.sha256(version.encode()).digest()[:7], "big")
        return os.stat_result((0, stamp, 0, 0, 0, 0, size, 0, 0, 0), {"st_mtime_ns": stamp})

    def open(self, mode: str = "rb", buffering: int = -1, **more: Any) -> IO[bytes]:
        """Open it for reading bytes at any position, whatever the mode."""
        del mode, more
        reader: Any = RangeReader(self)
        return io.BufferedReader(reader, BUFFER_BYTES) if buffering else reader

    def read_range(self, begin: int, end: int) -> bytes:
        """Return the bytes ``begin`` to ``end`` (exclusive), long ranges by several requests."""
        return b"".join(self.read_ranges(cut_range(begin, end)))

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each (begin, end) in order, one request each, `REQUESTS` at a time.

        A file that has another version by now is refused.
        """
        expected = self.version()

        def read(ends: tuple[int, int]) -> bytes:
            return with_retries(lambda: request_range(self.url, *ends, expected, self._token))

        return ordered_results(read, ranges, request_pool(os.getpid()), 2 * REQUESTS)

    def read_rows(self, begin: int, row_bytes: int, rows: np.ndarray) -> np.ndarray:
        """Return ascending rows, (n,) int64, as (n, row_bytes) uint8; row 0 begins at ``begin``."""
        found = np.empty((len(rows), row_bytes), np.uint8)
        cuts = plan_ranges(rows, row_bytes)
        ranges = [
            (begin + int(rows[low]) * row_bytes, begin + (int(rows[high - 1]) + 1) * row_bytes)
            for low, high in cuts
        ]
        for (low, high), data in zip(cuts, self.read_ranges(ranges), strict=True):
            block = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
            found[low:high] = block[rows[low:high] - rows[low]]
        return found


def cut_range(begin: int, end: int) -> list[tuple[int, int]]:
    """Cut bytes ``begin`` to ``end`` (exclusive) into ranges of one request."""
    return [(cut, min(cut + RANGE_BYTES, end)) for cut in range(begin, end, RANGE_BYTES)]


def plan_ranges(rows: np.ndarray, row_bytes: int) -> list[tuple[int, int]]:
    """Cut ascending rows, (n,) int64, where the gap is wide, or the range would be long.

    Returns positions in ``rows``, (low, high) with ``high`` exclusive.
    """
    wide = np.flatnonzero((np.diff(rows) - 1) * row_bytes > GAP_BYTES) + 1
    most = max(1, RANGE_BYTES // row_bytes)  # rows that one request spans
    cuts, low = [], 0
    for high in [*wide.tolist(), len(rows)]:
        while low < high:
            cut = low + int(np.searchsorted(rows[low:high], rows[low] + most))
            cuts.append((low, cut))
            low = cut
    return cuts


class RangeReader(io.RawIOBase):
    """A `RemotePath` as an open file."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.position, self.size = path, 0, path.version().size

    def readable(self) -> bool:
        """Return True."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; return it."""
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, out: Any) -> int:
        """Fill ``out`` from the position on; short at the end of the file only."""
        data = self.path.read_range(self.position, min(self.position + len(out), self.size))
        out[: len(data)] = data
        self.position += len(data)
        return len(data)


@functools.cache
def request_pool(process: int) -> ThreadPoolExecutor:
    """Return the threads that request ranges, by process id: a forked process needs its own."""
    del process
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="snip-range")


def map_requests(work: Callable[[Any], R], items: Iterable[Any]) -> list[R]:
    """Return ``work(item)`` of each, in order; `REQUESTS` at a time."""
    with ThreadPoolExecutor(REQUESTS) as pool:  # not `request_pool`: the work may wait for that one
        return list(pool.map(work, items))


def is_remote(location: object) -> bool:
    """Tell a URL from a path."""
    return isinstance(location, RemotePath) or (
        isinstance(location, str) and bool(scheme_of(location))
    )


def path_of(location: str, token: Token | None = None) -> Path:
    """Return a URL or a local path as a path."""
    return RemotePath(location, token) if scheme_of(location) else Path(location).expanduser()


def absolute_location(location: str | Path) -> str:
    """Return an absolute path, or a URL as manifests may show it."""
    if is_remote(location):
        return redacted(str(location))
    return str(Path(location).expanduser().absolute())


def arrow_source(path: Path) -> Any:
    """Return what pyarrow reads: a local path as it is, a remote one as an open file."""
    return path.open("rb") if isinstance(path, RemotePath) else path


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL or local path, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url) if scheme_of(url) else (fsspec.filesystem("file"), url)
    except ImportError as error:
        raise SnipError(f"{scheme_of(url)}:// needs one more package: {error}") from error
    except ValueError as error:
        expected = "a local path or a URL of http(s), hf or what fsspec knows"
        raise SnipError(f"{redacted(url)}: expected {expected}: {error}") from error


@contextmanager
def store_errors(
    url: str, unknown: type[SnipError] = SnipError, doing: str = "read"
) -> Iterator[None]:
    """Turn what fsspec and the stores' own packages raise into our errors."""
    text = redacted(url)
    try:
        yield
    except SnipError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{text}: no such file; check the URL and the file numbers") from error
    except PermissionError as error:
        text += ": not permitted: log in with the store's own tool, or ask its owner"
        raise SnipError(f"{text} ({error})") from error
    except OSError as error:
        raise TemporaryError(f"{text}: cannot be {doing}: {error}; {AGAIN}") from error
    except Exception as error:  # no login, no such bucket, a broken connection: one class a store
        what = f"{type(error).__name__}: {error}"
        raise unknown(f"{text}: cannot be {doing}: {what}") from error


def read_version(url: str, token: Token | None = None) -> FileVersion:
    """Request size and version of a file; refuse a web server that sends no ranges."""
    if is_web(url):
        try:
            return web.read_range(url, 0, 1, token)[0]
        except RangeError as error:
            raise InputError(f"{redacted(url)}: empty file, expected some bytes") from error
    with store_errors(url):
        if not scheme_of(url):
            stat = Path(url).stat()
            return FileVersion(stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")
        system, path = filesystem(url)
        system.invalidate_cache()
        info = system.info(path)
    if info.get("type") == "directory" or info.get("size") is None:
        raise MissingError(f"{redacted(url)}: expected a file, found a folder")
    named = [f"{info[name]}" for name in VERSION_KEYS if info.get(name)]
    return FileVersion(int(info["size"]), named[0] if named else "")


def request_range(
    url: str, begin: int, end: int, expected: FileVersion, token: Token | None = None
) -> bytes:
    """Request the bytes ``begin`` to ``end`` (exclusive) of the expected version, once."""
    if is_web(url):
        version, data = web.read_range(url, begin, end, token)
        if version != expected:
            raise InputError(f"{redacted(url)}: changed while it was read; run it again")
        return data
    with store_errors(url, TemporaryError):  # the file was there: what fails now may pass
        system, path = filesystem(url)
        data = bytes(system.cat_file(path, start=begin, end=end))
    if len(data) != end - begin:
        text = f"{redacted(url)}: bytes {begin:,} to {end:,} were requested"
        raise TemporaryError(f"{text}, {len(data):,} came")
    return data


def open_stream(
    url: str, begin: int = 0, version: str | None = None, token: Token | None = None
) -> Stream:
    """Open a file at byte ``begin``; at 0 if its version is another one or there are no ranges.

    Of web files the version is a strong ETag: only such a file can be continued by a range.
    """
    if not is_web(url):
        now = read_version(url)
        begin = 0 if begin > now.size or version not in (None, now.version) else begin
        chunks = (request_range(url, *ends, now) for ends in cut_range(begin, now.size))
        return Stream(begin, now.size, now.version, chunks)
    stream = web.open_range(url, begin, token=token, if_range=version or "")
    strong = stream.version if stream.version.startswith('"') else ""  # RFC 9110, 8.8.3: W/ is not
    return stream._replace(version=strong)
