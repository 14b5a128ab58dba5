"""Which files a URL means: a file, a folder (not recursive), a glob, or a ``{part:04d}`` pattern.

Web servers have no common way to list files: there, a file or a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError, UsageError
from snipdedup.storage.manifest import MANIFEST
from snipdedup.storage.remote import (
    RemotePath,
    filesystem,
    map_requests,
    store_errors,
    with_retries,
)
from snipdedup.storage.urls import PART, expand_parts, is_web, redacted

FEATURES, METADATA = "img_emb", "metadata"  # folders that lie side by side in LAION's layout
RESULT_MASK = "is_dup.npy"  # with a manifest: a result of snip dedup


def list_folder(url: str) -> tuple[dict[str, int | None], list[str]] | None:
    """Return sizes of files by name (None if unknown) and names of folders; None of a file.

    Hidden files are left out.
    """

    def ask() -> list[dict[str, Any]] | None:
        with store_errors(url):
            system, path = filesystem(url)
            system.invalidate_cache()
            if system.info(path)["type"] != "directory":
                return None
            return list(system.ls(path, detail=True))

    entries = with_retries(ask)
    if entries is None:
        return None
    named = [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in entries]
    sizes = {
        name: entry.get("size")
        for name, entry in named
        if name and not name.startswith(".") and entry["type"] == "file"
    }
    return sizes, [name for name, entry in named if entry["type"] == "directory"]


def find_remote_files(
    url: str, numbers: tuple[int, int] | None, suffixes: Sequence[str], none: str
) -> list[Path]:
    """Return the files that a URL means; those of a pattern in its order, else in any.

    Parameters
    ----------
    url : str
    numbers : (int, int), optional
        Part numbers of a pattern, end exclusive.
    suffixes : sequence of str
        Of a folder, the files with the first of these that any file has.
    none : str
        Begins the error if there is no such file.

    Raises
    ------
    SnipError
        If nothing matches, or the store cannot be reached.
    UsageError
        If a web server would have to list its files.
    """
    if numbers is not None:
        paths = [RemotePath(location) for location in expand_parts(url, range(*numbers))]
        exist = map_requests(RemotePath.is_file, paths)
        missing = [path for path, exists in zip(paths, exist, strict=True) if not exists]
        if missing:
            raise SnipError(f"{none}: {missing[0]} ({len(missing)} of {len(paths)} are missing)")
        return list(paths)
    if is_web(url):
        if has_magic(redacted(url)) or not Path(redacted(url)).suffix:
            raise UsageError(
                f"{redacted(url)}: a web server does not list its files; name one, or use a "
                "{part:04d} pattern with --parts (a folder that snip wrote: snip download it first)"
            )
        return [RemotePath(url)]
    if not has_magic(url):
        return find_in_folder(url, suffixes)
    with store_errors(url):
        system, path = filesystem(url)
        found = system.glob(path, detail=True)
    names = [name for name, entry in found.items() if entry["type"] == "file"]
    if not names:
        raise SnipError(f"{none}: nothing matches {redacted(url)}")
    return [RemotePath(system.unstrip_protocol(name)) for name in names]


def find_in_folder(url: str, suffixes: Sequence[str]) -> list[Path]:
    """Return a file, or the files of a folder, or of its ``img_emb/`` if it has none itself."""
    listing = list_folder(url)
    if listing is None:
        return [RemotePath(url)]
    names, folders = listing
    if {MANIFEST, RESULT_MASK} <= set(names):
        raise UsageError(
            f"{redacted(url)}: expected features or metadata, found what snip dedup wrote; fetch "
            f"it first: snip download {redacted(url)} FOLDER"
        )
    for suffix in suffixes:
        found = [name for name in names if name.lower().endswith(suffix)]
        if found:
            return [RemotePath(f"{url.rstrip('/')}/{name}") for name in found]
    if FEATURES in folders and ".npy" in suffixes:
        return find_in_folder(f"{url.rstrip('/')}/{FEATURES}", suffixes)
    raise SnipError(
        f"nothing to read in {redacted(url)}: expected {' or '.join('*' + s for s in suffixes)} "
        "(the folder is not searched recursively)"
    )


def metadata_beside(url: str, suffixes: Sequence[str]) -> Path | None:
    """Return ``metadata/`` of a folder that holds it and ``img_emb/``, and no features itself."""
    listing = None if PART in url or has_magic(url) or is_web(url) else list_folder(url)
    names, folders = listing or ({}, [])
    if not {FEATURES, METADATA} <= set(folders):
        return None
    if any(name.lower().endswith(tuple(suffixes)) for name in names):
        return None
    return RemotePath(f"{url.rstrip('/')}/{METADATA}")


def is_remote_folder(url: str) -> bool:
    """Tell a folder from what names files; web servers have no folders."""
    names_files = PART in url or has_magic(url) or is_web(url)
    return not names_files and list_folder(url) is not None
