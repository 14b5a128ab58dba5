"""Which files a URL means: a file, a folder (not recursive), a glob, or a ``{part:04d}`` pattern.

Web servers have no listings that all agree on: there, a file or a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import buckets
from snipdedup.storage.manifest import MANIFEST
from snipdedup.storage.remote import RemotePath, map_requests, with_retries
from snipdedup.storage.urls import is_web, redacted

INNER, BESIDE = "img_emb", "metadata"  # a folder that has no shard itself may hold these
MASK = "is_dup.npy"  # with a manifest: an OUT


def find(url: str, span: tuple[int, int] | None, suffixes: Sequence[str], none: str) -> list[Path]:
    """Return the files that a URL means; of a pattern in its order, else in any.

    Parameters
    ----------
    url : str
    span : (int, int), optional
        Part numbers of a pattern, end exclusive.
    suffixes : sequence of str
        Of a folder, the files with the first of these that any has.
    none : str
        What to say where there is nothing.

    Raises
    ------
    SnipError
        If nothing matches, or the store cannot be asked.
    UsageError
        If a web server is to be listed.
    """
    if span is not None:
        return numbered(url, span, none)
    if is_web(url):
        if has_magic(redacted(url)) or not Path(redacted(url)).suffix:
            raise UsageError(
                f"{redacted(url)}: a web server does not list its files; name one, or use a "
                "{part:04d} pattern with --parts (a folder that snip wrote: snip download it first)"
            )
        return [RemotePath(url)]
    found = matching(url) if has_magic(url) else inside(url, suffixes)
    if not found:
        raise SnipError(f"{none}: nothing matches {redacted(url)}")
    return found


def numbered(pattern: str, span: tuple[int, int], none: str) -> list[Path]:
    """Expand a ``{part:04d}`` pattern."""
    try:
        paths = [RemotePath(pattern.format(part=part)) for part in range(*span)]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{redacted(pattern)}: expected a pattern such as img_emb_{{part:04d}}.npy"
        ) from error
    there = map_requests(RemotePath.is_file, paths)
    missing = [path for path, is_there in zip(paths, there, strict=True) if not is_there]
    if missing:
        raise SnipError(f"{none}: {missing[0]} ({len(missing)} of {len(paths)} are missing)")
    return list(paths)


def matching(url: str) -> list[Path]:
    """Return the files that a glob names."""
    with buckets.explained(url):
        system, path = buckets.filesystem(url)
        entries = system.glob(path, detail=True).values()
    return [place(system, entry) for entry in entries if is_plain(entry)]


def inside(url: str, suffixes: Sequence[str]) -> list[Path]:
    """Return a file, or the files of a folder, or of its ``img_emb/`` where it has none itself."""
    entries = with_retries(lambda: entries_of(url))
    if entries is None:
        return [RemotePath(url)]
    files = [entry for entry in entries if is_plain(entry)]
    if {MANIFEST, MASK} <= {name_of(entry) for entry in files}:
        raise UsageError(
            f"{redacted(url)}: expected features or metadata, found what snip dedup wrote; fetch "
            f"it first: snip download {redacted(url)} FOLDER"
        )
    system, _ = buckets.filesystem(url)
    for suffix in suffixes:
        found = [entry for entry in files if name_of(entry).lower().endswith(suffix)]
        if found:
            return [place(system, entry) for entry in found]
    if INNER in folders(entries) and ".npy" in suffixes:
        return inside(f"{url.rstrip('/')}/{INNER}", suffixes)
    raise SnipError(
        f"nothing to read in {redacted(url)}: expected {' or '.join('*' + s for s in suffixes)} "
        "(the folder is not searched recursively)"
    )


def beside(url: str, suffixes: Sequence[str]) -> Path | None:
    """Return the ``metadata/`` beside ``img_emb/`` where a folder stands for both."""
    if "{part" in url or has_magic(url) or is_web(url):
        return None
    entries = entries_of(url) or []
    own = [entry for entry in entries if is_plain(entry)]
    if any(name_of(entry).lower().endswith(tuple(suffixes)) for entry in own):
        return None
    if not {INNER, BESIDE} <= folders(entries):
        return None
    return RemotePath(f"{url.rstrip('/')}/{BESIDE}")


def is_folder(url: str) -> bool:
    """Tell a folder from what names files; a web server has none."""
    plain = "{part" not in url and not has_magic(url) and not is_web(url)
    return plain and entries_of(url) is not None


def entries_of(url: str) -> list[dict[str, Any]] | None:
    """Return what is in a folder, None of a file."""
    with buckets.explained(url):
        system, path = buckets.filesystem(url)
        system.invalidate_cache()
        if system.info(path)["type"] != "directory":
            return None
        return list(system.ls(path, detail=True))


def is_plain(entry: dict[str, Any]) -> bool:
    """Tell a file that is not hidden."""
    return entry["type"] == "file" and not re.match(r"\.|$", name_of(entry))


def folders(entries: Sequence[dict[str, Any]]) -> set[str]:
    """Return the names of the folders among the entries."""
    return {name_of(entry) for entry in entries if entry["type"] == "directory"}


def name_of(entry: dict[str, Any]) -> str:
    """Return an entry's own name."""
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def place(system: Any, entry: dict[str, Any]) -> RemotePath:
    """Return an entry as a file elsewhere."""
    return RemotePath(system.unstrip_protocol(entry["name"]))
