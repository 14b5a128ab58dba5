"""Files that appear whole or not at all, and the manifest that vouches for a folder.

Every folder that snip writes (OUT, an encoder, an index, descriptors, filtered metadata) holds a
``snip.json``, written last. Where it stands, the folder is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import __version__
from snipdedup.config import Dedup, mistyped
from snipdedup.errors import SnipError, TakenError, UsageError, WriteError
from snipdedup.storage import locks, swap
from snipdedup.storage.urls import redacted

MANIFEST, WORK = swap.MANIFEST, swap.WORK
FORMAT = 1
FILES = "files"  # in the work: a result before it is whole
REQUEST = "request.json"
LOCK = "run.lock"  # in the work: one run at a time
DOOR = "door.lock"  # in the work, for moments: who takes OUT, or puts a result there
DOOR_S = 60.0  # to wait for another one at the door
SHORT = 80  # characters of a value shown in a message
SHORT_WRITE = " written"  # numpy's has no number: "512 requested and 128 written"
CRC_CHUNK = 1 << 22  # bytes
ROW_GROUP = 1 << 20  # rows of a row group of tables that are streamed
UMASK = os.umask(0)  # read once: to read it is to set it, for all threads
os.umask(UMASK)


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there only if the block succeeds.

    ``lasting`` waits until the disk has it. What is sealed (`seal`), or proves itself when it is
    read, is as well made anew after a power cut.

    Raises
    ------
    SnipError
        If the file cannot be written (no permission, disk full). What else fails in the block,
        such as reading an input, is not this file's and passes as it is.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    part = Path(name)
    try:
        try:
            yield part
        except OSError as error:
            if is_of_writing(error, part):
                raise cannot_write(path, error) from error
            raise
        with explained(path):
            part.chmod(0o666 & ~UMASK)
            if lasting:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process had begun to write into a folder; see `replacing`."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of any `OSError` in the block that ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> WriteError:
    """Return the refusal of a file that cannot be written."""
    why = error.strerror or str(error)
    if why.endswith(SHORT_WRITE):
        why = f"{why.rstrip('.')}: no space left, or a limit on the size of files"
    return WriteError(f"cannot write {path}: {why}")


def is_of_writing(error: OSError, part: Path) -> bool:
    """Tell whether an error comes from writing ``part``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename in (
        part,
        str(part),
    ):
        return True
    return error.errno is None and str(error).endswith(SHORT_WRITE)


def save_npy(path: Path, array: np.ndarray, *, lasting: bool = True) -> None:
    """Write one array as ``.npy``."""
    with replacing(path, lasting=lasting) as part, part.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def writing_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield a file that takes the bytes of an array of known shape, block by block."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        yield file
        if file.tell() - begin != dtype.itemsize * int(np.prod(shape)):
            raise SnipError(f"{path}: rows changed while they were written; run it again")


def save_npz(path: Path, *, lasting: bool = True, **arrays: np.ndarray) -> None:
    """Write named arrays as an uncompressed ``.npz``, which holds the CRC32 of each.

    ``np.savez`` can refuse objects from numpy 2.2 on only; before, ``allow_pickle`` is an array.
    """
    with replacing(path, lasting=lasting) as part, zipfile.ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def save_parquet(path: Path, table: Any) -> None:
    """Write a ``pyarrow.Table``."""
    import pyarrow.parquet as pq

    with replacing(path) as part:
        pq.write_table(table, part)


@contextmanager
def writing_parquet(path: Path, schema: Any) -> Iterator[Callable[[Any], None]]:
    """Yield a function that takes one ``pyarrow.Table`` after another of a file.

    Its row groups, and so its bytes, do not depend on how rows are cut into tables.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting, written = [schema.empty_table()], False

    def flush(*, last: bool) -> None:
        nonlocal written
        table = pa.concat_tables(waiting)
        stop = table.num_rows if last else table.num_rows // ROW_GROUP * ROW_GROUP
        if stop or (last and not written):
            file.write_table(table.slice(0, stop).combine_chunks(), ROW_GROUP)
            written = True
        waiting[:] = [table.slice(stop).combine_chunks()]  # lets go of what is written
        pa.default_memory_pool().release_unused()

    def take(table: Any) -> None:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROW_GROUP:
            flush(last=False)

    with replacing(path) as part, pq.ParquetWriter(part, schema) as file:
        yield take
        flush(last=True)


def save_json(path: Path, value: Any, *, lasting: bool = True) -> None:
    """Write JSON a person can read."""
    with replacing(path, lasting=lasting) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read JSON.

    Raises
    ------
    SnipError
        If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnipError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SnipError(f"{path}: expected JSON, but it cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_crc(path: Path) -> tuple[int, int]:
    """Return CRC32 and size of a whole file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CRC_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return crc, size


def seal(note: Path, files: Iterable[Path] | dict[str, Path], body: dict[str, Any]) -> None:
    """Write the note that a task is done: ``body``, the CRC32 of its files, and of all this.

    ``files`` may be named otherwise than they lie now, with ``/`` for folders.
    """
    named = files if isinstance(files, dict) else {path.name: path for path in files}
    said = {**body, "files": {name: file_crc(path)[0] for name, path in named.items()}}
    save_json(note, {**said, "seal": fingerprint(said)}, lasting=False)


def is_sealed(note: Path, folder: Path) -> bool:
    """Tell whether a task is done, and its files in ``folder`` are what they were then.

    A stopped run's files may have lain on a failing disk for a week; they are read once more
    before they are used.
    """
    try:
        said = load_json(note)
        whole = fingerprint({k: v for k, v in said.items() if k != "seal"}) == said["seal"]
        files = said["files"].items()
        return whole and all(file_crc(folder / name)[0] == crc for name, crc in files)
    except (SnipError, OSError, AttributeError, LookupError, TypeError):
        return False


def fingerprint(value: Any) -> str:
    """Return a short hash of a JSON value, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_manifest(
    folder: Path,
    kind: str,
    body: dict[str, Any],
    outputs: Iterable[Path],
    held: dict[str, Path] | None = None,
) -> None:
    """Write ``snip.json``, last of all, with versions and the SHA-256 of each output.

    Parameters
    ----------
    folder : Path
        The folder that the manifest vouches for.
    kind : str
        What the folder is: ``dedup``, ``encoder``, ``descriptors``, ``index``, ``filter``, ...
    body : dict
        The kind's own entries (settings, shards, counts, times).
    outputs : iterable of Path
        Files below ``folder``.
    held : dict, optional
        Other files of the result, by their paths below the folder that it is for.
    """
    files = {**(held or {}), **{path.relative_to(folder).as_posix(): path for path in outputs}}
    save_json(
        folder / MANIFEST,
        {
            "kind": kind,
            "format": FORMAT,
            "versions": versions(),
            **body,
            **{name: without_secrets(body[name]) for name in ("settings",) if name in body},
            "outputs": {
                name: {"size": path.stat().st_size, "sha256": sha256(path)}
                for name, path in sorted(files.items())
            },
        },
    )
    swap.sync_folder(folder)


def without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without what URLs may hide: passwords, signed queries."""

    def clean(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return redacted(value) if isinstance(value, str) and "://" in value else value

    return {name: clean(value) for name, value in settings.items()}


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises
    ------
    SnipError
        If there is none, or it is of another kind or of a newer format.
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


ENTRIES = {
    "format": int, "versions": dict, "settings": dict, "request": dict, "outputs": dict,
    "shards": list, "counts": dict, "method": dict, "encoder": dict, "rows": int, "files": list,
    "references": list, "bad_rows": dict | int,
}  # fmt: skip


def check_entries(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose entries are not of the types that snip writes."""
    for name, kind in ENTRIES.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise SnipError(f"{path}: damaged: its entry {name!r} is {short(manifest[name])}")
    for number, shard in enumerate(manifest.get("shards", [])):
        rows, name = (
            (shard.get("rows"), shard.get("name", "")) if isinstance(shard, dict) else (None, "")
        )
        if type(rows) is not int or not 0 <= rows < 1 << 48 or not isinstance(name, str):
            raise SnipError(f"{path}: damaged: shard {number} is {short(shard)}")
    if manifest.get("kind") == "dedup":
        saved = manifest.get("settings", {})
        wrong = mistyped(Dedup, {k: v for k, v in saved.items() if k != "max_memory"})  # in bytes
        if wrong is not None:
            raise SnipError(f"{path}: damaged: its setting {wrong!r} is {short(saved[wrong])}")


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Refuse a folder of ours whose files were changed so that nothing can be made of them.

    Checks say what is wrong where they can. What is left, of all the ways that a table or a
    manifest can be other than it was written, fails somewhere in the block.
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


def versions() -> dict[str, str]:
    """Return what ran: snipdedup, Python and the libraries that can change a result."""
    found = {"snipdedup": __version__, "python": platform.python_version()}
    for name in ("faiss-cpu", "numpy", "pyarrow", "torch"):
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:  # faiss built from source, say
            found[name] = "unknown"
    return found


def claim(
    out: Path,
    kind: str,
    request: dict[str, Any],
    *,
    overwrite: bool,
    late: bool = False,
    shared: bool = False,
    decisions: Collection[str] = (),
) -> str:
    """Take ``out`` for a run, or find that it is taken.

    Parameters
    ----------
    out : Path
        The folder to write; locked for this thread until its work is gone (or `locks.given_up`).
    kind : str
        As in `write_manifest`; the finished manifest must hold ``request``.
    request : dict
        All that the result depends on, by name: settings and inputs.
    overwrite : bool
        Replace what an earlier run of the same kind left.
    late : bool
        Leave an earlier result in place: `publish` puts the new one there when it is whole.
    shared : bool
        Other processes that say the same may take it too.
    decisions : collection of str
        Entries of ``request`` on which nothing in the work depends: a stopped run goes on where
        they are others, unless other processes are at it.

    Returns
    -------
    str
        ``"new"``; ``"resume"`` where a stopped run with the same request left its work;
        ``"done"`` where a finished one did.

    Raises
    ------
    SnipError
        If ``out`` belongs to another request, is being written by another run, or holds files that
        are not snip's.
    """
    swapped = settle(out)
    try:
        state = standing(out, kind, request, overwrite, decisions)  # before anything is written
    except SnipError as error:
        other = locks.who_has(out / WORK / LOCK, shared)
        if other is not None:  # said first: what another run is at just now is no one's fault
            raise in_use(out, other) from error
        raise
    same = swapped and not differences(read_manifest(out, kind).get("request", {}), request)
    if state == "done" and (same or not overwrite):
        return state
    with door(out):
        alone = refuse_company(out, shared)
        state = standing(out, kind, request, overwrite, decisions if alone else ())
        if overwrite and state != "new":
            state = reopen(out, request, decisions) if late else "new"
        note = out / WORK / REQUEST
        if state == "new":
            empty_work(out)
            save_json(note, request)  # before the manifest goes: one of them says whose it is
            if not late:
                clear(out, keep_work=True)
        elif state == "resume" and differences(load_json(note), request):
            save_json(note, request)
        if shared:
            locks.share(out / WORK / LOCK)
    return state


def reopen(out: Path, request: dict[str, Any], decisions: Collection[str]) -> str:
    """Return ``"resume"`` where what stands in the work is of use to a run that overwrites."""
    note = out / WORK / REQUEST
    same = note.is_file() and not differences(load_json(note), request, decisions)
    return "resume" if same else "new"


def standing(
    out: Path,
    kind: str,
    request: dict[str, Any],
    overwrite: bool,
    decisions: Collection[str] = (),
) -> str:
    """Return what `claim` does, and raise what it does; nothing is written."""
    note = out / WORK / REQUEST
    free: Collection[str] = ()
    if (out / MANIFEST).is_file():
        state, earlier = "done", read_manifest(out, kind).get("request", {})
    elif note.is_file():
        state, earlier, free = "resume", load_json(note), decisions
    elif out.exists() and not is_free(out):
        raise SnipError(f"--out {out} exists and is not a folder that snip wrote; choose another")
    else:
        state, earlier = "new", request
    differing = differences(earlier, request, free)
    if differing and not overwrite:
        raise SnipError(
            f"--out {out} holds a {'finished' if state == 'done' else 'stopped'} run with other "
            f"{'; '.join(differing)}. Choose another folder, or replace it with --overwrite"
        )
    return state


def refuse_company(out: Path, shared: bool = False) -> bool:
    """Lock ``out`` for this thread, or for all that share the run; tell whether none else has it.

    Raises
    ------
    SnipError
        If another run has it, or it cannot be written.
    """
    path = out / WORK / LOCK
    with explained(path):
        other = locks.take(path)
        alone = other is None
        if not alone and shared:
            other = locks.take(path, shared)
    if other is not None:
        raise in_use(out, other)
    return alone


def in_use(out: Path, other: str) -> SnipError:
    """Return the refusal of a folder that another run has."""
    return SnipError(
        f"--out {out} is being written by another run ({other}); wait for it, or choose "
        "another folder"
    )


@contextmanager
def door(out: Path) -> Iterator[None]:
    """Be the only one that takes ``out`` or puts a result there, for a moment; wait for others."""
    path, end = out / WORK / DOOR, time.monotonic() + DOOR_S
    with explained(path):
        while (other := locks.take(path)) is not None:
            if time.monotonic() > end:
                raise in_use(out, other)
            time.sleep(0.02)
    try:
        yield
    finally:
        locks.remove(path)
        with suppress(OSError):  # missing, or not empty
            (out / WORK).rmdir()


def is_finished(folder: Path) -> bool:
    """Tell whether a folder has its manifest; ends a swap that was interrupted just then."""
    return (folder / MANIFEST).is_file() or (settle(folder) and (folder / MANIFEST).is_file())


def settle(out: Path) -> bool:
    """End a swap that was interrupted, if there is one; tell whether there was.

    Raises
    ------
    SnipError
        If the process that is at it does not come to its end, or the folder cannot be written.
    """
    if not swap.is_begun(out):
        return False
    with door(out), explained(out):
        if swap.is_begun(out):  # else the other one did it
            keep = swap.finish(out)
            if not keep and locks.take(out / WORK / LOCK) is None:
                end_work(out)
            swap.end(out)
    return True


def is_free(out: Path) -> bool:
    """Tell whether a folder is empty, but for what a claim that was stopped at once leaves."""
    if not out.is_dir() or any(path.name != WORK for path in out.iterdir()):
        return False
    work = out / WORK
    started = (f".{REQUEST}.", LOCK, DOOR)  # a note that is not whole; else it may be someone's own
    return not work.exists() or (
        work.is_dir() and all(path.name.startswith(started) for path in work.iterdir())
    )


def empty_work(out: Path) -> None:
    """Remove the work but its lock, and its note, which says whose the folder is."""
    for path in (out / WORK).glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (REQUEST, LOCK, DOOR, swap.JOURNAL):
            path.unlink(missing_ok=True)


def end_work(out: Path) -> None:
    """Remove the work, and give up the lock last."""
    empty_work(out)
    swap.end(out)
    (out / WORK / REQUEST).unlink(missing_ok=True)
    locks.remove(out / WORK / LOCK)
    with suppress(OSError):  # missing, or the next run's already
        (out / WORK).rmdir()


def release(out: Path) -> None:
    """Give up a claim: remove the work, and the folder if nothing else is in it."""
    end_work(out)
    with suppress(OSError):  # missing, or not empty
        out.rmdir()


def release_unbegun(out: Path) -> None:
    """Give up a claim where the work says whose it is and no more: there is nothing to resume."""
    work = out / WORK
    if work.is_dir() and all(path.name in (REQUEST, LOCK) for path in work.iterdir()):
        release(out)


def publish(
    out: Path,
    kind: str,
    body: dict[str, Any],
    parts: Iterable[Path],
    held: Iterable[Path] = (),
    *,
    gone: Iterable[str] = (),
    keep_work: bool = False,
) -> None:
    """Put finished files from a folder below the work into ``out``, and end the work.

    An earlier result goes only then: until the new one is whole with its manifest it stands, and a
    stop from there on leaves what the next run ends (`settle`).

    Parameters
    ----------
    out, kind, body
        As in `write_manifest`.
    parts : iterable of Path
        Files of one folder directly below the work; their place below ``out`` is that below it.
    held : iterable of Path
        Files of ``out`` that stay part of the result.
    gone, keep_work
        As `install` takes them.

    Raises
    ------
    TakenError
        As `install`.
    """
    work, parts = out / WORK, list(parts)
    folders = {path.relative_to(work).parts[0] for path in parts}
    source = work / (folders.pop() if folders else FILES)
    parts = [path for path in parts if path != source / MANIFEST]  # of a run stopped just here
    files = [path.relative_to(source).as_posix() for path in parts]
    kept = {path.relative_to(out).as_posix(): path for path in held}
    write_manifest(source, kind, body, parts, kept)
    request = body.get("request")
    install(out, source, files, request=request, gone=gone, keep_work=keep_work)


def install(
    out: Path,
    source: Path,
    files: Iterable[str],
    *,
    request: dict[str, Any] | None = None,
    gone: Iterable[str] = (),
    keep_work: bool = False,
) -> None:
    """Put files and their manifest into ``out`` in the place of an earlier result.

    Parameters
    ----------
    out : Path
    source : Path
        A folder directly below the work, with the manifest.
    files : iterable of str
        Names below it.
    request : dict, optional
        What the run was claimed with.
    gone : iterable of str
        Files of ``out`` that go besides those that only the earlier manifest names.
    keep_work : bool
        Leave the work.

    Raises
    ------
    TakenError
        If the folder is not this run's any more: another process took it for dead, and went on.
    """
    with door(out):
        settled = swap.is_begun(out)
        with explained(out):
            if settled:  # of another process of this run that was killed just then
                swap.finish(out)
        if settled or not locks.holds(out / WORK / LOCK) or not is_noted(out, request):
            raise TakenError(
                f"{out} was taken over by another process while this one did not show that it "
                "lives; what it wrote stands"
            )
        now = load_json(source / MANIFEST)["outputs"]
        lost = {name for name in earlier_outputs(out) if name not in now}
        with explained(out):
            swap.begin(out, source, files, lost | set(gone), keep_work)
            swap.finish(out)
        shutil.rmtree(source, ignore_errors=True)
        if not keep_work:
            end_work(out)
        swap.end(out)


def is_noted(out: Path, request: dict[str, Any] | None) -> bool:
    """Tell whether the note in the work, where there is one, is of this request."""
    note = out / WORK / REQUEST
    return request is None or not note.is_file() or not differences(load_json(note), request)


def earlier_outputs(out: Path) -> list[str]:
    """Return the files that the manifest in a folder names; refuse names of files elsewhere."""
    path = out / MANIFEST
    names = list(load_json(path).get("outputs", {})) if path.is_file() else []
    for name in names:  # a manifest is a file like any other: anyone may have written it
        swap.refuse_outside(out, name, path)
    return names


def differences(
    earlier: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Return what differs between two requests but for ``free`` entries, one line each, by name."""
    return [
        f"{name} ({short(earlier.get(name))}, now {short(now.get(name))})"
        for name in sorted({*earlier, *now} - set(free))
        if fingerprint(earlier.get(name)) != fingerprint(now.get(name))
    ]


def short(value: Any) -> str:
    """Return a value as JSON, cut to what fits into a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else text[:SHORT] + "..."


def clear(out: Path, *, keep_work: bool = False) -> None:
    """Remove a run's files: the manifest first, so that the folder is never taken for whole."""
    names = earlier_outputs(out)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in names:
        (out / name).unlink(missing_ok=True)
    if not keep_work:
        end_work(out)


def refuse_output_inside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write into an input folder, or over or beside an input file.

    Raises
    ------
    SnipError
        If ``out`` is an input, lies in an input folder, or is the folder of an input file. A new
        folder beside an input file is no harm.
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
    """Refuse to write a file over one that snip wrote or reads; see `refuse_output_inside`.

    Raises
    ------
    SnipError
        If ``path`` is an input, lies in an input folder, or is a file that a folder of ours cannot
        be without: its manifest, what that vouches for, the work of a stopped run.
    UsageError
        If it is a folder, or something else that is no file: it would be replaced by one.
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
    try:
        manifest = load_json(folder / MANIFEST)
    except SnipError:  # none, or a file of someone else
        return False
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    return isinstance(outputs, dict) and name.as_posix() in outputs
