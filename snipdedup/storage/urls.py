"""URLs as text: what they name, what of them may be shown, and ``{part:04d}`` patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit, urlunsplit

from snipdedup.errors import SnipError, UsageError

PART = "{part"  # begins the place of the file number in a pattern


def scheme_of(location: str) -> str:
    """Return the scheme of a URL in lower case, an empty text for a path."""
    scheme, mark, _ = location.partition("://")
    return scheme.lower() if mark else ""


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
    """Return the file name at the end of a location; refuse one that is empty, hidden or a path."""
    path = urlsplit(location).path if is_web(location) else location
    name = path.rpartition("/")[2]
    name = unquote(name) if is_web(location) else name
    if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
        raise SnipError(f"{redacted(location)}: expected a file name at its end")
    return name


def expand_parts(pattern: str, numbers: Iterable[int]) -> list[str]:
    """Put file numbers into a ``{part:04d}`` pattern; refuse one with other fields."""
    try:
        return [pattern.format(part=number) for number in numbers]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        expected = "a pattern such as img_emb_{part:04d}.npy"
        raise UsageError(f"{redacted(pattern)}: expected {expected}") from error
