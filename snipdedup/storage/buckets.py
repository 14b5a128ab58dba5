"""Files that fsspec knows how to open (``s3://``, ``gs://``, ``memory://`` ...), and local ones.

fsspec is imported only for a URL that needs it; what a store needs besides (s3fs, gcsfs) it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from snipdedup.errors import SnipError
from snipdedup.storage.urls import (
    CHUNK,
    Folder,
    MissingError,
    Remote,
    Stream,
    TemporaryError,
    scheme_of,
)

AGAIN = "run again later: what is complete is kept"


class LocalFolder(Folder):
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, str(path)

    def list(self) -> tuple[dict[str, Remote], list[str]]:
        """See `Folder.list`."""
        if not self.path.is_dir():
            raise MissingError(f"no such file or folder: {self.path}")
        entries = list(self.path.iterdir())
        files = {
            path.name: Remote(str(path), size=path.stat().st_size)
            for path in entries
            if path.is_file()
        }
        return files, [path.name for path in entries if path.is_dir()]

    def child(self, name: str) -> LocalFolder:
        """See `Folder.child`."""
        return LocalFolder(self.path / name)

    def parent(self) -> LocalFolder | None:
        """See `Folder.parent`."""
        return LocalFolder(self.path.resolve().parent)


class BucketFolder(Folder):
    """A folder that fsspec lists."""

    def __init__(self, url: str) -> None:
        self.url = self.shown = url.rstrip("/")

    def list(self) -> tuple[dict[str, Remote], list[str]]:
        """See `Folder.list`."""
        with explained(self.url):
            system, path = filesystem(self.url)
            entries = system.ls(path, detail=True)
        files, folders = {}, []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory":
                folders.append(name)
            elif name:
                files[name] = Remote(f"{self.url}/{name}", size=entry.get("size"))
        if not files and not folders:
            raise MissingError(f"{self.shown}: no such folder, or it is empty; check the URL")
        return files, folders

    def child(self, name: str) -> BucketFolder:
        """See `Folder.child`."""
        return BucketFolder(f"{self.url}/{name}")

    def parent(self) -> BucketFolder | None:
        """See `Folder.parent`."""
        head = self.url.rpartition("/")[0]
        return None if head.endswith("/") or head.endswith(":") else BucketFolder(head)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise SnipError(
            f"{scheme_of(url)}:// needs fsspec: pip install 'snipdedup-toolkit[hub]'"
        ) from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SnipError(f"{scheme_of(url)}:// needs one more package: {error}") from error
    except ValueError as error:
        raise SnipError(
            f"{Remote(url).shown}: expected a local path or a URL of http(s), hf or what fsspec "
            f"knows: {error}"
        ) from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what stores raise, each its own way, into our errors."""
    shown = Remote(url).shown
    try:
        yield
    except SnipError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{shown}: no such file; check the URL and the file numbers") from error
    except PermissionError as error:
        raise SnipError(
            f"{shown}: not permitted: log in with the store's own tool, or ask its owner ({error})"
        ) from error
    except OSError as error:
        raise TemporaryError(f"{shown}: cannot be read: {error}; {AGAIN}") from error
    except Exception as error:  # the stores' own libraries: no login, no such bucket, ...
        raise SnipError(f"{shown}: cannot be read: {type(error).__name__}: {error}") from error


def describe(url: str) -> tuple[int, str]:
    """Return size of a file and what changes when it does."""
    if not scheme_of(url):
        stat = Path(url).stat()
        return stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}"
    system, path = filesystem(url)
    return int(system.size(path)), str(system.ukey(path))


def open_file(url: str) -> IO[bytes]:
    """Open a file for reading at any place."""
    if not scheme_of(url):
        return Path(url).open("rb")
    system, path = filesystem(url)
    return system.open(path, "rb")


def open_at(remote: Remote, begin: int = 0, validator: str | None = None) -> Stream:
    """Open a file at byte ``begin``; at 0 if it is not the version that ``validator`` names."""
    with explained(remote.url):
        total, version = describe(remote.url)
    if begin > total or validator not in (None, version):
        begin = 0
    return Stream(begin, total, version, chunks(remote.url, begin, total))


def chunks(url: str, begin: int, total: int) -> Iterator[bytes]:
    """Yield the bytes of a file from ``begin`` on."""
    with explained(url), open_file(url) as file:
        file.seek(begin)
        while begin < total:
            chunk = file.read(min(CHUNK, total - begin))
            if not chunk:
                raise TemporaryError(f"{Remote(url).shown}: ends after {begin:,} bytes; {AGAIN}")
            begin += len(chunk)
            yield chunk


def parquet_rows(remote: Remote) -> int:
    """Count the rows of a parquet file from its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(remote.url), open_file(remote.url) as file:
        try:
            return int(pq.read_metadata(file).num_rows)
        except pa.ArrowInvalid as error:
            raise SnipError(f"{remote.shown}: truncated or not a parquet file: {error}") from error
