"""Pictures of rows whose features ``snip embed`` made, from where its metadata says they lie.

The metadata may be a stranger's: a file is opened only if it is one that IMAGES of the manifest
names, or lies in a folder of these, whatever links lead to it.
"""

from __future__ import annotations

import tarfile
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.origin import Origin
from snipdedup.inspection.display import is_number
from snipdedup.inspection.thumbnails import FILE_BYTES, Thumbnails
from snipdedup.metadata.gather import RowTexts
from snipdedup.pictures.containers import image_column
from snipdedup.pictures.items import clean
from snipdedup.pictures.sources import listed_files
from snipdedup.storage.remote import is_remote
from snipdedup.storage.web import PART

PLACES = ("path", "tar", "member", "parquet", "parquet_row")  # columns of its metadata
LIST = ".txt"
ROWS_A_READ = 16  # of a parquet file: each may hold megabytes


class Sources:
    """What IMAGES names on this machine: files, and folders with all that they hold."""

    def __init__(self, images: list[str]) -> None:
        self.files: set[Path] = set()
        self.folders: list[Path] = []
        for name in images:
            path = Path(name)
            if is_remote(name) or not path.is_absolute():
                continue
            if path.is_dir():
                self.folders.append(path.resolve())
            elif path.is_file() and path.suffix.lower() == LIST:
                with suppress(SnipError):
                    self.files |= {
                        one.resolve() for one in listed_files(path) if not is_remote(one)
                    }
            elif path.is_file():
                self.files.add(path.resolve())
            else:  # a glob, or a pattern of numbers
                wild = [n for n, part in enumerate(path.parts) if has_magic(part) or PART in part]
                self.folders += [Path(*path.parts[: wild[0]]).resolve()] if wild else []

    def find(self, name: str) -> Path | None:
        """Return a file by its path, relative to the folders or absolute; None if it is outside."""
        paths = [Path(name)] if Path(name).is_absolute() else [f / name for f in self.folders]
        for path in paths:
            with suppress(OSError, ValueError):  # no file has such a name
                real = path.resolve()
                inside = real in self.files or any(map(real.is_relative_to, self.folders))
                if inside and real.is_file():
                    return real
        return None


def read_places(texts: RowTexts, rows: np.ndarray) -> dict[int, dict[str, str]]:
    """Return some of `PLACES` for each row that has a picture; frames of videos have none."""
    columns = {name: texts.read(texts.find(wanted=(name,)), rows) for name in PLACES}
    frames = texts.read(texts.find(wanted=("second",)), rows)
    places = {
        row: {name: values[row] for name, values in columns.items() if row in values}
        for row in np.unique(rows).tolist()
    }
    return {row: place for row, place in places.items() if place and row not in frames}


def by_place(origin: Origin, texts: RowTexts, rows: np.ndarray) -> Thumbnails:
    """Return thumbnails by row number, as a text, of files whose sha256 is that of the metadata."""
    sums = texts.read(texts.find(wanted=("sha256",)), rows)
    found = Thumbnails(sums={str(row): sha256 for row, sha256 in sums.items()})
    sources = Sources(origin.images)
    inner: dict[
        tuple[str, Path], dict[str, list[str]]
    ] = {}  # of containers: rows by what is inside
    for row, place in read_places(texts, rows).items():
        kind = next((name for name in ("path", "tar", "parquet") if name in place), "")
        inside = place.get({"tar": "member", "parquet": "parquet_row"}.get(kind, ""), "")
        file = sources.find(place[kind]) if kind else None
        if file is not None and kind == "path":
            found.add_file(file, str(row))
        elif file is not None and inside:
            inner.setdefault((kind, file), {}).setdefault(inside, []).append(str(row))
    for (kind, file), wanted in progress.track(inner.items(), "pictures", "files", len(inner)):
        with suppress(tarfile.TarError, EOFError, OSError, ValueError):  # changed since
            if kind == "tar":
                add_members(file, wanted, found)
            else:
                add_rows(file, origin.column, wanted, found)
    return found


def add_members(path: Path, wanted: dict[str, list[str]], found: Thumbnails) -> None:
    """Add members of a tar by their names."""
    left = set(wanted)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = clean(member.name)
            if name in left and member.isfile() and member.size <= FILE_BYTES:
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                for row in wanted[name]:
                    found.add(row, data)
                left.discard(name)
            if not left:
                return


def add_rows(
    path: Path, asked: str | None, wanted: dict[str, list[str]], found: Thumbnails
) -> None:
    """Add pictures of a parquet file by their row numbers."""
    file = pq.ParquetFile(path, pre_buffer=False)
    column, first = image_column(file.schema_arrow, asked), 0
    numbers = {int(row): rows for row, rows in wanted.items() if is_number(row)}
    for group in range(file.num_row_groups if column is not None else 0):
        stop = first + file.metadata.row_group(group).num_rows
        last = max((row for row in numbers if first <= row < stop), default=-1)
        if last >= 0:
            at = first
            for batch in file.iter_batches(ROWS_A_READ, row_groups=[group], columns=[column]):
                values: Any = batch.column(0)
                for row in range(at, at + batch.num_rows) if at <= last else ():
                    value = values[row - at].as_py() if row in numbers else None
                    data = value.get("bytes") if isinstance(value, dict) else value
                    for shown in numbers.get(row, ()):
                        found.add(shown, data or b"")
                at += batch.num_rows
                if at > last:
                    break
        first = stop
