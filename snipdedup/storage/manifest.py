"""The manifest of a finished folder, and how a new result takes the place of an earlier one.

Every folder that snip writes (OUT, an encoder, an index, descriptors, filtered metadata) holds a
``snip.json``, written last: a folder with a manifest is complete.

A new result is made below the work, with its manifest. The rename of its folder to ``work/new`` is
the instant from which it counts. Then its files are moved to their places; after a kill in between,
whoever reads or claims the folder next moves the rest.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata as packages
from pathlib import Path, PurePosixPath
from typing import Any

from snipdedup import __version__
from snipdedup.commands import mistyped
from snipdedup.config import Dedup
from snipdedup.errors import SnipError
from snipdedup.storage import locks
from snipdedup.storage.atomic import explained, load_json, save_json, sha256, sync_folder
from snipdedup.storage.locks import WORK
from snipdedup.storage.web import redacted

MANIFEST = "snip.json"
FORMAT = 1
NEW = "new"  # in the work: a complete result whose files go to their places
EARLIER = "earlier.json"  # there: the manifest of the result that it replaces
SHORT = 80  # characters of a value shown in a message
ENTRIES = {
    "format": int, "versions": dict, "settings": dict, "request": dict, "outputs": dict,
    "shards": list, "counts": dict, "method": dict, "encoder": dict, "rows": int, "files": list,
    "references": list, "bad_rows": dict | int,
}  # fmt: skip


def write_manifest(
    folder: Path,
    kind: str,
    body: dict[str, Any],
    outputs: Iterable[Path],
    kept: dict[str, Path] | None = None,
) -> None:
    """Write ``snip.json``, last of all, with versions and the SHA-256 of each output.

    Parameters
    ----------
    folder : Path
        The folder that the manifest describes.
    kind : str
        What the folder is: ``dedup``, ``encoder``, ``descriptors``, ``index``, ``filter``, ...
    body : dict
        The kind's own entries (settings, shards, counts, times). Of settings, the passwords and
        queries of URLs are left out.
    outputs : iterable of Path
        Files below ``folder``.
    kept : dict, optional
        Other files of the result, by their paths in the folder where they are already.
    """
    files = {**(kept or {}), **{path.relative_to(folder).as_posix(): path for path in outputs}}
    hashes = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in sorted(files.items())
    }
    if "settings" in body:
        body = {**body, "settings": without_secrets(body["settings"])}
    described = {"kind": kind, "format": FORMAT, "versions": versions(), **body}
    save_json(folder / MANIFEST, {**described, "outputs": hashes})
    sync_folder(folder)


def without_secrets(value: Any) -> Any:
    """Return settings without the passwords and signed queries of URLs."""
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) and "://" in value else value


def versions() -> dict[str, str]:
    """Return the versions of snipdedup, Python and the libraries that can change a result."""
    found = {"snipdedup": __version__, "python": platform.python_version()}
    for name in ("faiss-cpu", "numpy", "pyarrow", "torch"):
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:  # faiss built from source, say
            found[name] = "unknown"
    return found


def is_finished(folder: Path) -> bool:
    """Tell whether a folder has its manifest; completes a result that was being put in place."""
    return (folder / MANIFEST).is_file() or (recover(folder) and (folder / MANIFEST).is_file())


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises
    ------
    SnipError
        If there is none, it is of another kind or of a newer format, or its entries have types
        that snip does not write.
    """
    path = folder / MANIFEST
    if folder.is_file():
        todo = f"; for one of faiss: snip index FEATURES --base {folder} --out INDEX"
        raise SnipError(
            f"{folder}: expected a folder of kind {kind} that snip wrote, found a file"
            + (todo if kind == "index" else "")
        )
    if not is_finished(folder):
        raise SnipError(
            f"{folder}: expected a finished {kind} folder with {MANIFEST}, found none; "
            "was the run that makes it stopped?"
        )
    manifest = load_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise SnipError(f"{path}: expected a manifest of kind {kind!r}, found {found!r}")
    check_entries(path, manifest)
    if manifest.get("format", 0) > FORMAT:
        raise SnipError(
            f"{path}: written by a newer snipdedup (format {manifest['format']}, this one reads "
            f"up to {FORMAT}); upgrade with: pip install -U snipdedup-toolkit"
        )
    return manifest


def check_entries(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose entries are not of the types that snip writes."""
    for name, kind in ENTRIES.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise SnipError(f"{path}: damaged: its entry {name!r} is {short_json(manifest[name])}")
    for number, shard in enumerate(manifest.get("shards", [])):
        known = shard if isinstance(shard, dict) else {}
        rows, name = known.get("rows"), known.get("name", "")
        if type(rows) is not int or not 0 <= rows < 1 << 48 or not isinstance(name, str):
            raise SnipError(f"{path}: damaged: shard {number} is {short_json(shard)}")
    if manifest.get("kind") == "dedup":
        saved = manifest.get("settings", {})
        wrong = mistyped(Dedup, {k: v for k, v in saved.items() if k != "max_memory"})  # in bytes
        if wrong is not None:
            raise SnipError(f"{path}: damaged: its setting {wrong!r} is {short_json(saved[wrong])}")


def short_json(value: Any) -> str:
    """Return a value as JSON, cut to what fits into a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else text[:SHORT] + "..."


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Turn errors of the block into the refusal of a folder whose files were changed.

    Checks name what is wrong where they can. This covers the many other ways in which a table or a
    manifest can differ from what snip wrote.
    """
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError,
        ValueError, NotImplementedError,
    ) as error:  # fmt: skip
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SnipError(
            f"{folder}: its files are not as snip wrote them ({what}); make the folder anew"
        ) from error


def put_in_place(
    out: Path, source: Path, *, removed: Iterable[str] = (), keep_work: bool = False
) -> None:
    """Let a complete result take the place of an earlier one in ``out``, and end the work.

    Parameters
    ----------
    out : Path
    source : Path
        A folder directly below the work: a manifest, and the files that it names. Files that are
        not there must be in ``out`` already.
    removed : iterable of str
        Files of ``out`` to remove besides those that only the earlier manifest names.
    keep_work : bool
        Leave the rest of the work.

    Raises
    ------
    SnipError
        If this process has not claimed ``out`` any more, because another one finished the run.
    """
    with locks.door(out), explained(out):
        if move_result(out) or not locks.holds(out / WORK / locks.LOCK):
            raise SnipError(f"{out}: another process finished this run, or claimed the folder")
        named_outputs(out, out / MANIFEST)  # refused before anything is removed
        for name in removed:
            (out / name).unlink(missing_ok=True)
        for folder in {source, *(path.parent for path in source.rglob("*"))}:
            sync_folder(folder)
        new = out / WORK / NEW
        shutil.rmtree(new, ignore_errors=True)
        source.replace(new)
        sync_folder(new.parent)
        move_result(out)
        if not keep_work:
            locks.end_work(out)


def recover(out: Path) -> bool:
    """Complete a result that a killed run was putting in place; tell whether there was one.

    Raises
    ------
    SnipError
        If the process that does it does not come to its end, or the folder cannot be written.
    """
    if not (out / WORK / NEW / MANIFEST).is_file():
        return False
    with locks.door(out), explained(out):
        if move_result(out):  # else another process did it while this one waited
            keep = load_json(out / MANIFEST).get("settings", {}).get("keep_work")
            if not keep and locks.acquire(out / WORK / locks.LOCK) is None:
                locks.end_work(out)
    return True


def move_result(out: Path) -> bool:
    """Move the files of the new result to their places, the manifest last; False without one.

    Each step can be done again. While files are moved, ``out`` has no manifest, so that no reader
    takes a mixture of two results for a complete one.
    """
    new, earlier = out / WORK / NEW, out / WORK / NEW / EARLIER
    if not (new / MANIFEST).is_file():
        return False
    names = named_outputs(out, new / MANIFEST)
    if (out / MANIFEST).is_file():
        (out / MANIFEST).replace(earlier)
        sync_folder(out)
    for name in named_outputs(out, earlier):
        if name not in names:
            (out / name).unlink(missing_ok=True)
            for above in PurePosixPath(name).parents[:-1]:
                with suppress(OSError):  # not empty, or missing
                    (out / above).rmdir()
    for name in names:
        if (new / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).replace(out / name)
    for folder in {(out / name).parent for name in names}:
        sync_folder(folder)
    (new / MANIFEST).replace(out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(new, ignore_errors=True)
    return True


def named_outputs(out: Path, path: Path) -> set[str]:
    """Return the files that a manifest names, none without it; refuse names of files elsewhere."""
    names = set(load_json(path).get("outputs", {})) if path.is_file() else set()
    for name in names:  # anyone may have written the manifest
        if out.resolve() not in (out / name).resolve().parents:
            raise SnipError(f"{path} names {name}, which is not in the folder")
    return names
