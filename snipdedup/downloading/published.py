"""Folders that someone published with their manifest: an encoder, an index, an OUT.

Every file that the manifest names is fetched and proved by its checksum; the manifest itself comes
last, byte for byte, so that the folder is what its author made.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from snipdedup import progress
from snipdedup.downloading import transfer
from snipdedup.downloading.parallel import fetch_each
from snipdedup.downloading.transfer import Watch
from snipdedup.errors import SnipError
from snipdedup.storage import atomic, locks
from snipdedup.storage.manifest import FORMAT, MANIFEST, put_in_place
from snipdedup.storage.urls import MissingError, Remote, is_web

FETCHED = "artefact"  # below the work folder


def manifest_at(folder: str) -> Remote:
    """Return where the manifest of an http(s) folder is, if it is a published one."""
    head, mark, query = folder.partition("?")
    return Remote(f"{head.rstrip('/')}/{MANIFEST}{mark}{query}")


def read(manifest: Remote, target: Path) -> dict[str, Any]:
    """Fetch a manifest to ``target``, check that it is one, return it."""
    try:
        transfer.save(manifest, target)
    except MissingError:
        raise MissingError(
            f"{manifest.shown}: there is none; expected a template with {{part:04d}}, a metadata "
            "file, or a folder that snip wrote"
        ) from None
    found = atomic.load_json(target)
    if not isinstance(found, dict) or "kind" not in found or "outputs" not in found:
        raise SnipError(f"{manifest.shown}: expected a manifest of snip, found other JSON")
    if found.get("format", 0) > FORMAT:
        raise SnipError(
            f"{manifest.shown}: written by a newer snipdedup; upgrade with: pip install -U "
            "snipdedup-toolkit"
        )
    output_files(found, manifest)
    return found


def output_files(manifest: dict[str, Any], where: Remote) -> dict[str, Remote]:
    """Return the files that a manifest names, by their path below the folder.

    Raises
    ------
    SnipError
        If a path leads out of the folder: anyone may have written a manifest.
    """
    base, _, query = where.url.partition("?") if is_web(where.url) else (where.url, "", "")
    base = base.removesuffix(MANIFEST)
    files = {}
    for name, output in manifest["outputs"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or {"..", "."} & set(parts):
            raise SnipError(f"{where.shown} names {name!r}, which is not in the folder")
        if not isinstance(output, dict) or not {"size", "sha256"} <= set(output):
            raise SnipError(f"{where.shown}: expected size and sha256 of {name!r}, found {output}")
        path = quote(name) if is_web(where.url) else name
        files[name] = Remote(
            f"{base}{path}{'?' if query else ''}{query}",
            size=int(output["size"]),
            sha256=str(output["sha256"]),
            access=where.access,
        )
    return files


def holds(out: Path, manifest: dict[str, Any], copy: Path) -> bool:
    """Tell whether a folder is the published one, whose manifest is ``copy``, and whole."""
    if (out / MANIFEST).read_bytes() != copy.read_bytes():
        return False
    outputs = manifest["outputs"].items()
    return all(
        (out / name).is_file() and (out / name).stat().st_size == output["size"]
        for name, output in outputs
    )


def fetch(out: Path, where: Remote, manifest: dict[str, Any], jobs: int) -> str:
    """Bring a published folder to ``out``, which is claimed and holds its manifest in the work.

    Returns
    -------
    str
        What to say.
    """
    work = out / locks.WORK / FETCHED
    files = output_files(manifest, where)
    wanted = {name: file for name, file in files.items() if not here(name, file, work, out)}
    total = sum(file.size or 0 for file in wanted.values())
    tasks = [(file, work / name) for name, file in wanted.items()]
    with progress.bar(total, f"fetch {manifest['kind']}", "B") as bar:
        for _ in fetch_each(tasks, jobs, Watch(bar)):
            pass
    work.mkdir(exist_ok=True)  # where all is in its place already
    (out / locks.WORK / MANIFEST).replace(work / MANIFEST)
    put_in_place(out, work)
    size = sum(file.size or 0 for file in files.values())
    return f"{out}: {manifest['kind']}, {len(files)} files, {size:,} bytes, each proved by sha256"


def here(name: str, file: Remote, work: Path, out: Path) -> bool:
    """Tell whether this very file is there: in the work, or in its place since an earlier run."""
    if (work / name).is_file():
        if atomic.sha256(work / name) == file.sha256:
            return True
        (work / name).unlink()  # of an earlier version
    return (out / name).is_file() and atomic.sha256(out / name) == file.sha256
