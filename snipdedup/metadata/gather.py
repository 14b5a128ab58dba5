"""Columns of metadata at given rows: at any number of rows in any order, and of a finished OUT.

Of many rows, the files are read once, in row order, and values wait on disk. Of a finished OUT the
metadata that the run read is used if it has not changed; else ``OUT/metadata``, which holds the
kept rows only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.features.shards import implied_metadata, plan_blocks
from snipdedup.metadata.tables import ANY_KEY, Metadata, Table, open_metadata
from snipdedup.storage.atomic import explained
from snipdedup.storage.external_sort import READ, Sorter, Spread, pack, row_kind

Convert = Callable[[Table, str, Any], Any]  # of a file, a column's name, values: these converted
FLUSH_ROWS = 1 << 20
FLUSH_BYTES = 64 << 20
MASK_ROWS = 1 << 24  # of a mask, looked at together
CAPTIONS, URLS = ("caption", "text"), ("url", "image_url")  # names of columns
NAMES = {"key": ANY_KEY, "url": URLS, "caption": CAPTIONS}


def gather_column(
    metadata: Metadata, column: str, rows: np.ndarray, cuts: np.ndarray, convert: Convert,
    folder: Path,
) -> Generator[Any, None, None]:  # fmt: skip
    """Yield the column's values of each slice of ``rows``, None for a slice of no rows.

    ``rows``, (n,) int64, are global, in any order, each once; they may be mapped. ``cuts``,
    (slices + 1,) int64, are where slices begin and the last one ends. ``convert`` gives all values
    one type. Close the generator: it removes the temporary files in ``folder`` when it ends.
    """
    kind = np.dtype([("row", row_kind(metadata.rows)), ("place", row_kind(len(rows)))])
    spread = Spread(len(rows), 0, metadata.rows)
    try:
        slices = TableSlices(folder, cuts)
        by_row = Sorter(folder / "rows", kind, lambda r: r["row"].astype(np.uint64), spread=spread)
        for start, stop in plan_blocks(len(rows), READ):
            by_row.add(pack(kind, rows[start:stop], np.arange(start, stop)))
        for records in by_row.ascending():
            order = np.argsort(records["row"])
            row, place = (records[name][order].astype(np.int64) for name in ("row", "place"))
            for file, which, batch in metadata.pick([column], row):
                values = convert(file, column, batch.column(0))
                slices.add(pa.RecordBatch.from_pydict({"place": place[which], "value": values}))
        for number in range(len(cuts) - 1):
            table = slices.read(number)
            yield None if table is None else table.sort_by("place")["value"]
            pa.default_memory_pool().release_unused()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class TableSlices:
    """Rows with a ``place``, split over files by the slice, between two ``cuts``, that it is in.

    A slice is a file of Arrow streams one after another; files are open only while they are
    written to, however many slices there are.
    """

    def __init__(self, folder: Path, cuts: np.ndarray) -> None:
        self.folder, self.cuts = folder, cuts
        self.written: set[int] = set()
        self.batches: list[Any] = []
        self.rows = self.bytes = 0  # of these batches
        shutil.rmtree(folder, ignore_errors=True)  # files of a stopped run

    def add(self, batch: Any) -> None:
        """Take the rows of a record batch."""
        self.batches.append(batch)
        self.rows += batch.num_rows
        self.bytes += batch.nbytes
        if self.rows >= FLUSH_ROWS or self.bytes >= FLUSH_BYTES:
            self._flush()

    def read(self, number: int) -> Any:
        """Return the rows of a slice as a ``pyarrow.Table``, None if it has none."""
        self._flush()
        if number not in self.written:
            return None
        path, tables = self._path(number), []
        try:
            with path.open("rb") as file:
                while file.tell() < path.stat().st_size:
                    tables.append(pa.ipc.open_stream(file).read_all())
        except (pa.ArrowException, OSError) as error:
            raise SnipError(f"{path}: a temporary file cannot be read back: {error}") from error
        return pa.concat_tables(tables)

    def _flush(self) -> None:
        if not self.batches:
            return
        table = pa.Table.from_batches(self.batches).sort_by("place").combine_chunks()
        slices = np.searchsorted(self.cuts, table["place"].to_numpy(), side="right") - 1
        for start, stop in pairwise(np.flatnonzero(np.diff(slices, prepend=-1, append=-1))):
            number = int(slices[start])
            with explained(self._path(number)):
                self.folder.mkdir(parents=True, exist_ok=True)
                with (
                    self._path(number).open("ab") as file,
                    pa.ipc.new_stream(file, table.schema) as stream,
                ):
                    stream.write_table(table.slice(start, stop - start))
            self.written.add(number)
        self.batches, self.rows, self.bytes = [], 0, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.arrows"


@dataclass(frozen=True)
class RowTexts:
    """Columns of the metadata (None where none is left), by row of the set.

    ``is_dup``, (rows,) bool, is given where the metadata holds the kept rows only.
    """

    metadata: Metadata | None
    is_dup: np.ndarray | None = None

    def inputs(self) -> list[Path]:
        """Return the files that it reads, and their folders."""
        return [] if self.metadata is None else self.metadata.inputs()

    def find(self, asked: str | None = None, wanted: tuple[str, ...] = ()) -> str | None:
        """Return a column's name as `Metadata.column` does, None without metadata."""
        return None if self.metadata is None else self.metadata.column(asked, wanted)

    def about(self, rows: np.ndarray, *names: str) -> dict[str, dict[int, str]]:
        """Return ``key``, ``url`` or ``caption`` of rows, by these names; each as `read` does."""
        return {name: self.read(self.find(wanted=NAMES[name]), rows) for name in names}

    def read(self, column: str | None, rows: np.ndarray) -> dict[int, str]:
        """Return a column's texts by row, for rows (n,) in any order; rows without are left out."""
        if self.metadata is None or column is None:
            return {}
        rows = places = np.unique(rows)
        if self.is_dup is not None:
            rows = rows[~self.is_dup[rows]]
            places = rows - removed_before(self.is_dup, rows)
        texts = self.metadata.take(column, places).to_pylist()
        return {int(r): text for r, text in zip(rows, texts, strict=True) if text is not None}


def removed_before(is_dup: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return how many rows are removed before each of some ascending rows, (n,) int64."""
    counts = [np.count_nonzero(is_dup[slice(*ends)]) for ends in pairwise([0, *rows.tolist()])]
    return np.cumsum(counts, dtype=np.int64)


def kept_rows(is_dup: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return kept rows by their places among all kept rows, both ascending, (n,) int64."""
    rows, before = [np.empty(0, np.int64)], 0
    for start, stop in plan_blocks(len(is_dup), MASK_ROWS):
        kept = start + np.flatnonzero(~is_dup[start:stop])
        low, high = np.searchsorted(places, [before, before + len(kept)])
        rows.append(kept[places[low:high] - before])
        before += len(kept)
    return np.concatenate(rows)


def open_row_texts(out: Path, manifest: dict[str, Any], asked: str | None = None) -> RowTexts:
    """Open the metadata of a finished run of ``snip dedup``.

    ``asked`` is metadata that the user named; it is refused if it does not match the run's rows.
    """
    if asked is not None:
        metadata = open_metadata(asked)
        metadata.check_matches(manifest["shards"])
        return RowTexts(metadata)
    if (found := find_run_metadata(manifest)) is not None:
        return RowTexts(found)
    if (out / "metadata").is_dir():
        return RowTexts(open_metadata(out / "metadata"), np.load(out / "is_dup.npy", mmap_mode="r"))
    return RowTexts(None)


def find_run_metadata(manifest: dict[str, Any]) -> Metadata | None:
    """Return the metadata of a run of ``snip dedup``, None if it is missing or has changed.

    It is named by the settings, or implied by the folder of features.
    """
    settings = manifest["settings"]
    known = manifest["request"].get("metadata") or ()
    try:
        spec = settings.get("metadata")
        if spec is None and settings.get("features") is not None:
            spec = implied_metadata(settings["features"])
        if spec is None:
            return None
        metadata = open_metadata(spec)
        metadata.check_matches(manifest["shards"])
    except SnipError:  # moved, or in a store that cannot be reached now
        return None
    sizes = [path.stat().st_size for path in metadata.paths()]
    return metadata if not known or sizes == [file.get("size") for file in known] else None
