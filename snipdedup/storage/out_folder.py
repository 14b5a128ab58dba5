"""Folders that snip writes: who may write one, its manifest, and how a new result takes its place.

Every such folder (OUT, an encoder, an index, descriptors, filtered metadata) holds a ``snip.json``,
written last: a folder with a manifest is complete. A run claims the folder, and makes its files in
``work``, with their manifest. The rename of that folder to ``work/new`` is the instant from which
the result counts. Then its files are moved to their places; after a kill in between, whoever reads
or claims the folder next moves the rest.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata as packages
from pathlib import Path, PurePosixPath
from typing import Any

from snipdedup import __version__
from snipdedup.commands import mistyped
from snipdedup.config import Dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import atomic, locks
from snipdedup.storage.atomic import explained, load_json, sha256, short_hash, sync_folder
from snipdedup.storage.locks import CLAIM_LOCK, LOCK, REQUEST, WORK
from snipdedup.storage.web import redacted

MANIFEST = "snip.json"
FORMAT = 1
FILES = "files"  # in the work: the files of the result while they are made
NEW = "new"  # in the work: a complete result whose files go to their places
SHORT = 80  # characters of a value shown in a message
ENTRIES = {
    "format": int, "versions": dict, "settings": dict, "request": dict, "outputs": dict,
    "shards": list, "counts": dict, "method": dict, "encoder": dict, "rows": int, "files": list,
    "references": list, "also": list, "text": dict, "bad_rows": dict | int,
}  # fmt: skip


def write_manifest(
    folder: Path,
    kind: str,
    body: dict[str, Any],
    outputs: Iterable[Path],
    kept: dict[str, Path] | None = None,
) -> None:
    """Write ``snip.json``, last of all, with versions and the SHA-256 of each output.

    ``kind`` is what the folder is: ``dedup``, ``encoder``, ``index``, ... ``body`` has its own
    entries (settings, counts, times); passwords and queries of URLs in settings are left out.
    ``kept`` are files of the result that do not lie in ``folder``, by their later paths in it.
    """
    files = {**(kept or {}), **{path.relative_to(folder).as_posix(): path for path in outputs}}
    hashes = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in sorted(files.items())
    }
    if "settings" in body:
        body = {**body, "settings": without_secrets(body["settings"])}
    described = {"kind": kind, "format": FORMAT, "versions": versions(), **body}
    atomic.save_json(folder / MANIFEST, {**described, "outputs": hashes})
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
    recover(folder)
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest.

    It is refused if there is none, or if it is of another kind, of a newer format, or has entries
    of types that snip does not write.
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
        if wrong is None and saved.get("threshold", 0) is None:  # a run resolves it
            wrong = "threshold"
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


# ---- claims


def claim(
    out: Path,
    kind: str,
    request: dict[str, Any],
    *,
    overwrite: bool,
    shared: bool = False,
    decisions: Collection[str] = (),
) -> str:
    """Claim ``out`` for a run; the lock is this thread's until the work ends (`locks.released`).

    A folder of another request, of another run that is at work, or with files that are not snip's
    is refused. With ``overwrite``, an earlier result of the same kind stays until it is replaced.

    ``request`` is all that the result depends on; the manifest holds it, too. If ``shared``, other
    processes with the same request may claim the folder too. ``decisions`` are entries of
    ``request`` on which nothing in the work depends: a stopped run goes on with other ones, unless
    other processes work on it.

    Returns ``"new"``; ``"resume"`` after a stopped run, ``"done"`` after a finished one.
    """
    recovered = recover(out)
    lock, note = out / WORK / LOCK, out / WORK / REQUEST
    try:
        state = find_state(out, kind, request, overwrite, decisions)
    except SnipError as error:
        other = locks.holder(lock, shared)
        if other is not None:  # the more useful message
            raise locks.in_use(out, other) from error
        raise
    if state == "done" and (not overwrite or (recovered and is_result_of(out, kind, request))):
        return state
    with locks.claim_lock(out):
        free = decisions if locks.lock_run(out, shared) else ()  # only if no other one is at work
        state = find_state(out, kind, request, overwrite, free)  # another run may have ended
        if overwrite and state != "new":
            same = note.is_file() and not differences(load_json(note), request, decisions)
            state = "resume" if same else "new"
        if state == "new":
            locks.empty_work(out)
        if state != "done":
            atomic.save_json(note, request)
        if shared:
            locks.share(lock)
    return state


def is_result_of(out: Path, kind: str, request: dict[str, Any]) -> bool:
    """Tell whether a finished result is that of a request."""
    return not differences(read_manifest(out, kind).get("request", {}), request)


def find_state(
    out: Path, kind: str, request: dict[str, Any], overwrite: bool, free: Collection[str]
) -> str:
    """Return ``new``, ``resume`` or ``done``; refuse what may not be claimed, see `claim`."""
    if (out / MANIFEST).is_file():
        state, differing = "done", differences(read_manifest(out, kind).get("request", {}), request)
    elif (out / WORK / REQUEST).is_file():
        state, differing = "resume", differences(load_json(out / WORK / REQUEST), request, free)
    elif out.exists() and not is_free(out):
        raise SnipError(f"--out {out} exists and is not a folder that snip wrote; choose another")
    else:
        return "new"
    if differing and not overwrite:
        raise SnipError(
            f"--out {out} holds a {'finished' if state == 'done' else 'stopped'} run with other "
            f"{'; '.join(differing)}. Choose another folder, or replace it with --overwrite"
        )
    return state


def is_free(out: Path) -> bool:
    """Tell whether a folder is empty, but for what a claim that was stopped at once leaves."""
    begun = (f".{REQUEST}.", LOCK, CLAIM_LOCK)  # any other file may be someone's own
    work = out / WORK
    return (
        out.is_dir()
        and all(path == work for path in out.iterdir())
        and (not work.exists() or work.is_dir())
        and all(path.name.startswith(begun) for path in work.glob("*"))
    )


def differences(
    earlier: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Return how two requests differ but for ``free`` entries: a text each, ordered by name."""
    return [
        f"{name} ({short_json(earlier.get(name))}, now {short_json(now.get(name))})"
        for name in sorted({*earlier, *now} - set(free))
        if short_hash(earlier.get(name)) != short_hash(now.get(name))
    ]


def release(out: Path) -> None:
    """Give up a claim: remove the work, and the folder if nothing else is in it."""
    locks.end_work(out)
    with suppress(OSError):  # missing, or not empty
        out.rmdir()


@contextmanager
def released_on(refusal: type[SnipError], out: Path, *others: type[SnipError]) -> Iterator[None]:
    """Give up a claim if the block raises a refusal: there is nothing to go on from.

    An earlier result in ``out`` stays as it was. Errors of the kinds ``others`` are no refusals:
    what is complete stays, too.
    """
    try:
        yield
    except others:
        raise
    except refusal:
        release(out)
        raise


def release_unbegun(out: Path) -> None:
    """Give up a claim whose work holds the request and no more: there is nothing to resume."""
    work = out / WORK
    if work.is_dir() and all(path.name in (REQUEST, LOCK) for path in work.iterdir()):
        release(out)


# ---- results


def publish(
    out: Path,
    kind: str,
    body: dict[str, Any],
    parts: Iterable[Path],
    kept: Iterable[Path] = (),
    *,
    removed: Iterable[str] = (),
    keep_work: bool = False,
) -> None:
    """Write the manifest of finished files, and put all into ``out``; see `put_in_place`.

    ``parts`` are files of one folder directly below the work; their paths in ``out`` are those in
    it. ``kept`` are files of ``out`` that stay part of the result.
    """
    work, parts = out / WORK, list(parts)
    source = work / (parts[0].relative_to(work).parts[0] if parts else FILES)
    parts = [path for path in parts if path != source / MANIFEST]  # of a run stopped just here
    write_manifest(source, kind, body, parts, {p.relative_to(out).as_posix(): p for p in kept})
    put_in_place(out, source, removed=removed, keep_work=keep_work)


def put_in_place(
    out: Path, source: Path, *, removed: Iterable[str] = (), keep_work: bool = False
) -> None:
    """Let a complete result take the place of an earlier one in ``out``, and end the work.

    ``source`` is a folder directly below the work: a manifest, and the files that it names. Files
    that are not there must be in ``out`` already. ``removed`` are files of ``out`` to remove
    besides those that only the earlier manifest names. It is refused if another process finished
    the run, so that this one has not claimed ``out`` any more.
    """
    with locks.claim_lock(out), explained(out):
        if move_result(out) or not locks.holds(out / WORK / LOCK):
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
    """Complete a result that a killed run was putting in place; tell whether there was one."""
    if not (out / WORK / NEW / MANIFEST).is_file():
        return False
    with locks.claim_lock(out), explained(out):
        if move_result(out):  # else another process did it while this one waited
            keep = load_json(out / MANIFEST).get("settings", {}).get("keep_work")
            if not keep and locks.acquire(out / WORK / LOCK) is None:
                locks.end_work(out)
    return True


def move_result(out: Path) -> bool:
    """Move the files of the new result to their places, the manifest last; False without one.

    Each step can be done again. What the earlier manifest alone names goes first, then that
    manifest: no reader takes a mixture of two results for a complete one.
    """
    new = out / WORK / NEW
    if not (new / MANIFEST).is_file():
        return False
    names = named_outputs(out, new / MANIFEST)
    for name in named_outputs(out, out / MANIFEST) - names:
        (out / name).unlink(missing_ok=True)
        for above in PurePosixPath(name).parents[:-1]:
            with suppress(OSError):  # not empty, or missing
                (out / above).rmdir()
    (out / MANIFEST).unlink(missing_ok=True)
    sync_folder(out)
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
    """Return the files that a manifest names, none without it; refuse those outside ``out``."""
    names = set(load_json(path).get("outputs", {})) if path.is_file() else set()
    for name in names:  # anyone may have written the manifest
        if out.resolve() not in (out / name).resolve().parents:
            raise SnipError(f"{path} names {name}, which is not in the folder")
    return names


# ---- refusals


def refuse_output_inside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write into an input folder, or over or beside an input file.

    A new folder beside an input file is no harm.
    """
    target = out.resolve()
    for path in inputs:
        if target == path.resolve() and not path.is_dir():
            raise SnipError(f"{out} is an input; snip never writes there, choose another place")
        folder = (path if path.is_dir() else path.parent).resolve()
        if target == folder or (path.is_dir() and folder in target.parents):
            raise SnipError(
                f"--out {out} lies in the input folder {folder}; snip never writes there, "
                "choose another folder"
            )


def refuse_output_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse to write a file over one that snip wrote or reads, and over what is no file.

    Such are inputs, files in an input folder, and files that a folder of snip needs: its manifest,
    a file named there, the work of a stopped run.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe; name a file to write")
    refuse_output_inside(path, inputs)
    place = path.parent.resolve() / path.name  # a link in its place is replaced, not followed
    for target in {place, path.resolve()}:
        for folder in target.parents:
            if is_own(folder, target):
                raise SnipError(
                    f"{path} is a file of {folder}, which would not be whole without it; choose "
                    "another name"
                )


def is_own(folder: Path, path: Path) -> bool:
    """Tell whether a file below a folder is one that snip wrote there, or is writing."""
    name = path.relative_to(folder)
    if name.parts[0] == WORK:
        return (folder / WORK / LOCK).is_file() or (folder / WORK / REQUEST).is_file()
    if str(name) == MANIFEST:
        return True  # by this name alone snip knows its folders
    with suppress(SnipError, LookupError, TypeError):  # no manifest, or a file of someone else
        return name.as_posix() in load_json(folder / MANIFEST)["outputs"]
    return False
