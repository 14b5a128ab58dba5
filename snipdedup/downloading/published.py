"""Results that someone published with their manifest: an encoder, an index, an OUT.

Every file that the manifest names is fetched and checked by its SHA-256. The manifest itself comes
last, byte for byte, so that the folder is what its author made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from snipdedup import progress
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file
from snipdedup.errors import MissingError, SnipError
from snipdedup.storage import atomic, locks
from snipdedup.storage.out_folder import FORMAT, MANIFEST, put_in_place
from snipdedup.storage.web import is_web

FETCHED = "result"  # below the work folder


def manifest_in(folder: str) -> SourceFile:
    """Return the manifest of an http(s) folder; whether there is one is not known yet."""
    head, mark, query = folder.partition("?")
    return SourceFile(f"{head.rstrip('/')}/{MANIFEST}{mark}{query}")


def fetch_manifest(manifest: SourceFile, target: Path) -> dict[str, Any]:
    """Fetch a manifest to ``target``, check that it is one, return it."""
    try:
        fetch_file(manifest, target)
    except MissingError:
        expected = "a pattern with {part:04d}, a metadata file, or a folder that snip wrote"
        raise MissingError(f"{manifest.shown}: there is none; expected {expected}") from None
    found = atomic.load_json(target)
    if not isinstance(found, dict) or "kind" not in found or "outputs" not in found:
        raise SnipError(f"{manifest.shown}: expected a manifest of snip, found other JSON")
    if found.get("format", 0) > FORMAT:
        upgrade = "upgrade with: pip install -U snipdedup-toolkit"
        raise SnipError(f"{manifest.shown}: written by a newer snipdedup; {upgrade}")
    output_files(found, manifest)
    return found


def output_files(manifest: dict[str, Any], source: SourceFile) -> dict[str, SourceFile]:
    """Return the files that a manifest names, by their path below the folder.

    Raises
    ------
    SnipError
        If a path leads out of the folder: anyone may have written a manifest.
    """
    web = is_web(source.url)
    base, mark, query = source.url.partition("?") if web else (source.url, "", "")
    files = {}
    for name, output in manifest["outputs"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or {"..", "."} & set(parts):
            raise SnipError(f"{source.shown} names {name!r}, which is not in the folder")
        if not isinstance(output, dict) or not {"size", "sha256"} <= set(output):
            raise SnipError(f"{source.shown}: expected size and sha256 of {name!r}, found {output}")
        path = quote(name) if web else name
        files[name] = SourceFile(
            f"{base.removesuffix(MANIFEST)}{path}{mark}{query}",
            size=int(output["size"]),
            sha256=str(output["sha256"]),
            token=source.token,
        )
    return files


def is_complete_copy(out: Path, source: SourceFile) -> bool:
    """Tell whether a folder is a complete copy of the published one with this manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / MANIFEST
        manifest = fetch_manifest(source, copy)
        if (out / MANIFEST).read_bytes() != copy.read_bytes():
            return False
    return all(
        (out / name).is_file() and (out / name).stat().st_size == output["size"]
        for name, output in manifest["outputs"].items()
    )


def fetch_result(out: Path, source: SourceFile, manifest: dict[str, Any], jobs: int) -> str:
    """Fetch a published folder to ``out``, which is claimed and has its manifest in the work.

    Returns
    -------
    str
        The summary.
    """
    work = out / locks.WORK / FETCHED
    files = output_files(manifest, source)
    wanted = [(file, work / name) for name, file in files.items() if not is_here(name, file, out)]
    total = sum(file.size or 0 for file, _ in wanted)
    with progress.bar(total, f"fetch {manifest['kind']}", "B") as bar:
        monitor = Monitor(bar)
        for _ in monitor.map(lambda task: fetch_file(*task, monitor), wanted, jobs):
            pass
    work.mkdir(exist_ok=True)  # if all files were here already
    (out / locks.WORK / MANIFEST).replace(work / MANIFEST)
    put_in_place(out, work)
    size = sum(file.size or 0 for file in files.values())
    return f"{out}: {manifest['kind']}, {len(files)} files, {size:,} bytes, each proved by sha256"


def is_here(name: str, file: SourceFile, out: Path) -> bool:
    """Tell whether this very file is in the work, or in its place since an earlier run."""
    fetched = out / locks.WORK / FETCHED / name
    if fetched.is_file():
        if atomic.sha256(fetched) == file.sha256:
            return True
        fetched.unlink()  # of an earlier version
    return (out / name).is_file() and atomic.sha256(out / name) == file.sha256
