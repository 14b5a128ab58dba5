"""Which files a path or URL means: a file, folder (not recursive), glob or ``{part:04d}`` pattern.

In a glob, ``**`` stands for any folders, one in another; a folder that it matches is not read.
Web servers have no common way to list files: there, a file or a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import remote
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.web import PART, expand_parts, is_web, redacted, scheme_of

FEATURES, METADATA = "img_emb", "metadata"  # folders that lie side by side in LAION's layout
RESULT_MASK = "is_dup.npy"  # with a manifest: a result of snip dedup


def list_folder(url: str) -> tuple[dict[str, int | None], list[str]] | None:
    """Return sizes of files by name (None if unknown) and names of folders; None of a file.

    Hidden files are left out.
    """
    if not scheme_of(url):
        path = remote.path_of(url)
        if not path.is_dir():
            return None
        with remote.store_errors(url):
            entries = list(path.iterdir())
            files = [entry for entry in entries if entry.is_file() and entry.name[0] != "."]
            sizes: dict[str, int | None] = {file.name: file.stat().st_size for file in files}
            return sizes, [entry.name for entry in entries if entry.is_dir()]

    def list_store() -> list[dict[str, Any]] | None:
        with remote.store_errors(url):
            system, path = remote.filesystem(url)
            system.invalidate_cache()
            is_file = system.info(path)["type"] != "directory"
            return None if is_file else list(system.ls(path, detail=True))

    listed = remote.with_retries(list_store)
    if listed is None:
        return None
    named = [(entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in listed]
    shown = [(name, entry) for name, entry in named if name and name[0] != "."]
    return (
        {name: entry.get("size") for name, entry in shown if entry["type"] == "file"},
        [name for name, entry in named if entry["type"] == "directory"],
    )


def find_files(
    spec: str, numbers: tuple[int, int] | None, suffixes: Sequence[str], none: str
) -> list[Path]:
    """Return the files that a path or URL means; those of a pattern in its order, else in any.

    ``numbers`` are the part numbers of a pattern, end exclusive. Of a folder, it is the files with
    the first of ``suffixes`` that any file has. ``none`` begins the error if there is no file.
    """
    if numbers is not None:
        paths = [remote.path_of(location) for location in expand_parts(spec, range(*numbers))]
        exist = remote.map_requests(lambda path: path.is_file(), paths)
        missing = [path for path, exists in zip(paths, exist, strict=True) if not exists]
        if missing:
            raise SnipError(f"{none}: {missing[0]} ({len(missing)} of {len(paths)} are missing)")
        return paths
    path = remote.path_of(spec)
    if is_web(spec):
        if has_magic(redacted(spec)) or not path.suffix:
            raise UsageError(
                f"{redacted(spec)}: a web server does not list its files; name one, or use a "
                "{part:04d} pattern with --parts (a folder that snip wrote: snip download it first)"
            )
        return [path]
    if not has_magic(spec) or (not scheme_of(spec) and path.exists()):  # whatever its name has
        return find_in_folder(spec, suffixes, none)
    if scheme_of(spec):
        with remote.store_errors(spec):
            system, pattern = remote.filesystem(spec)
            entries = system.glob(pattern, detail=True)
        names = [name for name, entry in entries.items() if entry["type"] == "file"]
        found: list[Path] = [remote.RemotePath(system.unstrip_protocol(name)) for name in names]
    else:
        matches = dict.fromkeys(glob(str(path), recursive=True))  # ** twice finds files twice
        found = [Path(name) for name in matches if Path(name).is_file()]
    if not found:
        raise SnipError(f"{none}: nothing matches {redacted(spec)}")
    return found


def find_in_folder(location: str, suffixes: Sequence[str], none: str) -> list[Path]:
    """Return a file, or the files of a folder, or of its ``img_emb/`` if it has none itself."""
    listing = list_folder(location)
    if listing is None:
        if not scheme_of(location) and not remote.path_of(location).exists():
            raise SnipError(f"{none}: no such file or folder: {location}")
        return [remote.path_of(location)]
    names, folders = listing
    if scheme_of(location) and {MANIFEST, RESULT_MASK} <= set(names):
        raise UsageError(
            f"{redacted(location)}: expected features or metadata, found what snip dedup wrote; "
            f"fetch it first: snip download {redacted(location)} FOLDER"
        )
    is_set = MANIFEST in names and FEATURES in folders and ".npy" in suffixes  # of snip embed
    for suffix in () if is_set else suffixes:
        found = [name for name in names if name.lower().endswith(suffix)]
        if found:
            return [remote.path_of(f"{location.rstrip('/')}/{name}") for name in found]
    if FEATURES in folders and ".npy" in suffixes:
        return find_in_folder(f"{location.rstrip('/')}/{FEATURES}", suffixes, none)
    expected = ", ".join(f"*{suffix}" for suffix in suffixes)
    hint = ""
    if ".npy" in suffixes and (folders or names):
        hint = f"; for pictures, first: snip embed {redacted(location)} --out OUT"
    raise SnipError(
        f"{none} in {redacted(location)}: expected {expected} (the folder is not searched "
        f"recursively){hint}"
    )


def metadata_beside(spec: str, suffixes: Sequence[str]) -> Path | None:
    """Return ``metadata/`` of a folder that holds it and ``img_emb/``, and no features itself."""
    names, folders = (list_folder(spec) if is_folder(spec) else None) or ({}, [])
    if not {FEATURES, METADATA} <= set(folders):
        return None
    if MANIFEST not in names and any(n.lower().endswith(tuple(suffixes)) for n in names):
        return None
    return remote.path_of(f"{spec.rstrip('/')}/{METADATA}")


def is_folder(spec: str) -> bool:
    """Tell a folder from what names files; web servers have no folders."""
    if not scheme_of(spec):
        return remote.path_of(spec).is_dir()
    names_files = PART in spec or has_magic(spec) or is_web(spec)
    return not names_files and list_folder(spec) is not None
