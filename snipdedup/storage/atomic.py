"""Files that appear whole or not at all, and done files, which prove what a task wrote.

A file is written beside its place under another name, and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import SnipError, WriteError

SHORT_WRITE = " written"  # numpy's error has no number: "512 requested and 128 written"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CRC_CHUNK = 1 << 22  # bytes
ROW_GROUP = 1 << 20  # rows of a row group of tables that are streamed
UMASK = os.umask(0)  # read once: to read it is to set it, for all threads
os.umask(UMASK)


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there only if the block succeeds.

    ``lasting`` waits until the disk has the file. Files that a done file names need not wait: their
    checksum tells after a power cut whether they are complete. A file that cannot be written is
    refused; other errors of the block, such as those of reading an input, pass unchanged.
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
            short = error.errno is None and str(error).endswith(SHORT_WRITE)
            if short or error.errno in DISK_FULL or str(error.filename) == name:
                with explained(path):
                    raise
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
    """Remove the incomplete files that a killed process left in a folder; see `replacing`."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn any `OSError` of the block into the refusal that ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if why.endswith(SHORT_WRITE):
            why = f"{why}: no space left, or a limit on the size of files"
        raise WriteError(f"cannot write {path}: {why}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder: which files were renamed or removed."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with suppress(OSError):  # a file system that cannot
            os.fsync(handle)
    finally:
        os.close(handle)


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

    Its row groups, and so its bytes, do not depend on how rows are cut into tables. Only texts get
    dictionaries: of numbers that hardly repeat, these make a file larger and slower to write.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting, written = [schema.empty_table()], False
    texts = [field.name for field in schema if pa.types.is_string(field.type)]

    def flush(*, last: bool) -> None:
        nonlocal written
        table = pa.concat_tables(waiting)
        stop = table.num_rows if last else table.num_rows // ROW_GROUP * ROW_GROUP
        if stop or (last and not written):
            file.write_table(table.slice(0, stop).combine_chunks(), ROW_GROUP)
            written = True
        waiting[:] = [table.slice(stop).combine_chunks()]  # frees the memory of written rows
        pa.default_memory_pool().release_unused()

    def take(table: Any) -> None:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROW_GROUP:
            flush(last=False)

    with replacing(path) as part, pq.ParquetWriter(part, schema, use_dictionary=texts) as file:
        yield take
        flush(last=True)


def save_json(path: Path, value: Any, *, lasting: bool = True) -> None:
    """Write JSON a person can read."""
    with replacing(path, lasting=lasting) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read JSON; refuse a file that is missing or is not JSON."""
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


def file_crc(path: Path) -> int:
    """Return the CRC32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CRC_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def short_hash(value: Any) -> str:
    """Return a short hash of a JSON value, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_done_file(path: Path, files: Iterable[Path] | dict[str, Path], body: Any) -> None:
    """Write that a task is done: ``body``, the CRC32 of the task's files, and a hash of all this.

    A dict of ``files`` gives the names that they will have later, with ``/`` for folders.
    """
    named = files if isinstance(files, dict) else {file.name: file for file in files}
    done = {**body, "files": {name: file_crc(file) for name, file in named.items()}}
    save_json(path, {**done, "seal": short_hash(done)}, lasting=False)


def is_done(path: Path, folder: Path) -> bool:
    """Tell whether a done file is there, and the files in ``folder`` are those that it names.

    A run may go on a week after it was stopped, so the files are read again before they are used.
    """
    return read_done(path, folder) is not None


def read_done(path: Path, folder: Path) -> dict[str, Any] | None:
    """Return the body of a done file, None if `is_done` is false."""
    try:
        done = load_json(path)
        whole = done.pop("seal") == short_hash(done)
        files = done.pop("files").items()
        return done if whole and all(file_crc(folder / n) == crc for n, crc in files) else None
    except (SnipError, OSError, AttributeError, LookupError, TypeError):
        return None
