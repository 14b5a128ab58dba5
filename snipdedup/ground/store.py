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
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import __version__
from snipdedup.errors import SnipError, UsageError, WriteError
from snipdedup.ground import locks
from snipdedup.ground.remote import shown
from snipdedup.settings import Dedup, mistyped

MANIFEST = "snip.json"
FORMAT = 1
WORK = "work"  # what an unfinished run needs to go on; removed at the end
REQUEST = "request.json"
LOCK = "run.lock"  # in the work: one run at a time
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
    """Write named arrays as an uncompressed ``.npz``, which holds the CRC32 of each."""
    with replacing(path, lasting=lasting) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


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


def write_manifest(folder: Path, kind: str, body: dict[str, Any], outputs: Iterable[Path]) -> None:
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
    """
    names = sorted(str(path.relative_to(folder)) for path in outputs)
    save_json(
        folder / MANIFEST,
        {
            "kind": kind,
            "format": FORMAT,
            "versions": versions(),
            **body,
            **{name: without_secrets(body[name]) for name in ("settings",) if name in body},
            "outputs": {
                name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                for name in names
            },
        },
    )


def without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without what URLs may hide: passwords, signed queries."""

    def clean(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return shown(value) if isinstance(value, str) and "://" in value else value

    return {name: clean(value) for name, value in settings.items()}


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises
    ------
    SnipError
        If there is none, or it is of another kind or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
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
        Remove what an earlier run of the same kind left.
    late : bool
        Leave an earlier result in place for now, so that a refused input costs nothing: the caller
        calls `clear` with ``keep_work`` when the new one is ready to be written.
    shared : bool
        Other processes that say the same may take it too.

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
    if (out / WORK / LOCK).is_file() and (overwrite or not (out / MANIFEST).is_file()):
        refuse_company(out, shared)  # said first: what another run is at just now is no one's fault
    state = standing(out, kind, request, overwrite=overwrite)
    if state == "done" and not overwrite:
        return state
    refuse_company(out, shared)
    state = standing(out, kind, request, overwrite=overwrite)  # as the lock found it
    note = out / WORK / REQUEST
    if overwrite and state != "new":
        if late and note.is_file() and not differences(load_json(note), request):
            return "resume"
        empty_work(out)
        state = "new"
    if state == "new":
        save_json(note, request)  # before the manifest goes: one of them always says whose it is
        if not late:
            clear(out, keep_work=True)
    return state


def standing(out: Path, kind: str, request: dict[str, Any], *, overwrite: bool) -> str:
    """Return what `claim` does, and raise what it does; nothing is written."""
    note = out / WORK / REQUEST
    if (out / MANIFEST).is_file():
        state, earlier = "done", read_manifest(out, kind).get("request", {})
    elif note.is_file():
        state, earlier = "resume", load_json(note)
    elif out.exists() and not is_free(out):
        raise SnipError(f"--out {out} exists and is not a folder that snip wrote; choose another")
    else:
        state, earlier = "new", request
    differing = differences(earlier, request)
    if differing and not overwrite:
        raise SnipError(
            f"--out {out} holds a {'finished' if state == 'done' else 'stopped'} run with other "
            f"{'; '.join(differing)}. Choose another folder, or replace it with --overwrite"
        )
    return state


def refuse_company(out: Path, shared: bool = False) -> None:
    """Lock ``out`` for this thread, or for all that share the run.

    Raises
    ------
    SnipError
        If another run has it, or it cannot be written.
    """
    path = out / WORK / LOCK
    with explained(path):
        other = locks.take(path, shared)
    if other is not None:
        raise SnipError(
            f"--out {out} is being written by another run ({other}); wait for it, or choose "
            "another folder"
        )


def is_free(out: Path) -> bool:
    """Tell whether a folder is empty, but for what a claim that was stopped at once leaves."""
    if not out.is_dir() or any(path.name != WORK for path in out.iterdir()):
        return False
    work = out / WORK
    started = (f".{REQUEST}.", LOCK)  # a note that is not whole; else it may be someone's own
    return not work.exists() or (
        work.is_dir() and all(path.name.startswith(started) for path in work.iterdir())
    )


def empty_work(out: Path) -> None:
    """Remove the work but its lock, and its note, which says whose the folder is."""
    for path in (out / WORK).glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (REQUEST, LOCK):
            path.unlink(missing_ok=True)


def end_work(out: Path) -> None:
    """Remove the work, and give up the lock last."""
    empty_work(out)
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
    out: Path, kind: str, body: dict[str, Any], parts: Iterable[Path], held: Iterable[Path] = ()
) -> None:
    """Move finished files from a folder below the work into ``out``; the manifest comes last.

    Parameters
    ----------
    out, kind, body
        As in `write_manifest`.
    parts : iterable of Path
        Files whose place below ``out`` is that below their folder in the work.
    held : iterable of Path
        Files of ``out`` that stay part of the result.
    """
    targets = list(held)
    for part in parts:
        target = out / Path(*part.relative_to(out / WORK).parts[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        targets.append(part.replace(target))
    write_manifest(out, kind, body, targets)
    end_work(out)


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two requests, one line each, by name."""
    return [
        f"{name} ({short(earlier.get(name))}, now {short(now.get(name))})"
        for name in sorted({*earlier, *now})
        if fingerprint(earlier.get(name)) != fingerprint(now.get(name))
    ]


def short(value: Any) -> str:
    """Return a value as JSON, cut to what fits into a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else text[:SHORT] + "..."


def clear(out: Path, *, keep_work: bool = False) -> None:
    """Remove a run's files: the manifest first, so that the folder is never taken for whole."""
    names: list[str] = []
    if (out / MANIFEST).is_file():
        names = list(load_json(out / MANIFEST).get("outputs", {}))
        for name in names:  # a manifest is a file like any other: anyone may have written it
            if out.resolve() not in (out / name).resolve().parents:
                raise SnipError(f"{out / MANIFEST} names {name}, which is not in the folder")
        (out / MANIFEST).unlink()
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
