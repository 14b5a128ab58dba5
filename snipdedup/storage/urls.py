"""A file somewhere else: what is known of it before it comes, and the ways it can fail to come.

Nothing is fetched here: `web` and `buckets` open such files, `landing` brings them to the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote, urlsplit, urlunsplit

from snipdedup.errors import SnipError

CHUNK = 1 << 20


class MissingError(SnipError):
    """There is no such file."""


class TemporaryError(SnipError):
    """A fault that may be gone soon; ``wait`` is how many seconds the other side asks for."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


class RangeError(TemporaryError):
    """The part that was asked for is not there: what stands here is of another file."""


@dataclass(frozen=True)
class Access:
    """A token, and the only origin (scheme, host, port) that it may be sent to."""

    origin: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Remote:
    """One file.

    Attributes
    ----------
    url : str
        An http(s) URL, another URL that fsspec knows, or a local path.
    size : int, optional
    sha256, git_sha1 : str, optional
        Of its bytes, in hex; ``git_sha1`` as git names a blob.
    access : Access, optional
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    access: Access | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The file's name."""
        return name_of(self.url)

    @property
    def shown(self) -> str:
        """The location, as messages and manifests may show it."""
        return redacted(self.url)


@dataclass
class Stream:
    """The bytes of a file from ``begin`` on; ``validator`` changes when the file does."""

    begin: int
    total: int | None
    validator: str | None
    chunks: Iterator[bytes]


class Folder:
    """A folder of remote files that can be listed; it is asked once."""

    shown: str

    @cached_property
    def listing(self) -> tuple[dict[str, Remote], list[str]]:
        """Its files by name, and the names of the folders in it."""
        return self.list()

    @property
    def files(self) -> dict[str, Remote]:
        """Its files by name."""
        return self.listing[0]

    @property
    def folders(self) -> list[str]:
        """The names of the folders in it."""
        return self.listing[1]

    def list(self) -> tuple[dict[str, Remote], list[str]]:
        """Ask for `listing`."""
        raise NotImplementedError

    def child(self, name: str) -> Folder:
        """Return a folder in it."""
        raise NotImplementedError

    def parent(self) -> Folder | None:
        """Return the folder that it lies in, None at the top."""
        raise NotImplementedError


def scheme_of(location: str) -> str:
    """Return ``http`` of ``HTTP://...``, nothing for a path."""
    scheme, mark, _ = location.partition("://")
    return scheme.lower() if mark else ""


def origin_of(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme.lower()}://{parts.netloc.rpartition('@')[2].lower()}"


def is_web(location: str) -> bool:
    """Tell whether a location is an http(s) URL."""
    return scheme_of(location) in ("http", "https")


def redacted(location: str) -> str:
    """Return a URL without user, password, query and fragment; a path as it is."""
    if is_web(location):
        parts = urlsplit(location)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return re.sub(r"://[^/]*@", "://", location)


def name_of(location: str) -> str:
    """Return the file name at the end of a location."""
    path = urlsplit(location).path if is_web(location) else location
    last = path.rpartition("/")[2]
    name = unquote(last) if is_web(location) else last
    if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
        raise SnipError(f"{redacted(location)}: expected a file name at its end")
    return name


def beside(location: str, name: str) -> str:
    """Return the location of a file in the same folder as another, without its query."""
    if is_web(location):
        parts = urlsplit(location)
        return urlunsplit(
            (parts.scheme, parts.netloc, f"{parts.path.rpartition('/')[0]}/{name}", "", "")
        )
    head, slash, _ = location.rpartition("/")
    return head + slash + name
