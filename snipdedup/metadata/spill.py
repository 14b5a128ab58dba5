"""Rows that do not fit into memory, split over files on disk by a number each, read back by it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.storage.atomic import explained

PART_ROWS = 1 << 22  # rows of a part that a step may hold in memory
MOST_PARTS = 1024
FLUSH_ROWS = 1 << 20
FLUSH_BYTES = 64 << 20


def parts_for(rows: int) -> int:
    """Return into how many parts that many rows are split."""
    return int(min(max(1, -(-rows // PART_ROWS)), MOST_PARTS))


class Spill:
    """Record batches of one schema, split by part; each part keeps the order of its rows.

    A part is a file of Arrow streams one after another, so files are open while they are written
    to only, however many parts there are.
    """

    def __init__(self, folder: Path, parts: int) -> None:
        self.folder, self.parts = folder, parts
        self.rows = self.bytes = 0
        self.written: set[int] = set()
        self.labels: list[np.ndarray] = []
        self.batches: list[Any] = []
        shutil.rmtree(folder, ignore_errors=True)  # of a stopped run
        with explained(folder):
            folder.mkdir(parents=True)

    def add(self, label: np.ndarray, batch: Any) -> None:
        """Take the rows of a ``pyarrow.RecordBatch``; ``label`` (n,) says the part of each."""
        self.labels.append(label)
        self.batches.append(batch)
        self.rows += batch.num_rows
        self.bytes += batch.nbytes
        if self.rows >= FLUSH_ROWS or self.bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits in memory."""
        if not self.rows:
            return
        label = np.concatenate(self.labels)
        order = np.argsort(label, kind="stable")
        table = pa.Table.from_batches(self.batches).take(pa.array(order)).combine_chunks()
        cuts = np.searchsorted(label[order], np.arange(self.parts + 1))
        for part in np.flatnonzero(np.diff(cuts)):
            path = self._path(int(part))
            self.written.add(int(part))
            rows = table.slice(cuts[part], cuts[part + 1] - cuts[part])
            with (
                explained(path),
                path.open("ab") as file,
                pa.ipc.new_stream(file, table.schema) as stream,
            ):
                stream.write_table(rows)
        self.labels, self.batches, self.rows, self.bytes = [], [], 0, 0

    def read(self, part: int) -> Any:
        """Return the rows of one part as a ``pyarrow.Table``, None if it has none.

        Raises
        ------
        SnipError
            If what was written is gone or damaged.
        """
        self.flush()
        path = self._path(part)
        if part not in self.written:
            return None
        tables = []
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                while file.tell() < size:
                    tables.append(pa.ipc.open_stream(file).read_all())
        except (pa.ArrowException, OSError) as error:
            raise SnipError(f"{path}: what was put there cannot be read back: {error}") from error
        return pa.concat_tables(tables)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.arrows"


@contextmanager
def spilling(folder: Path, parts: int) -> Iterator[Spill]:
    """Yield a `Spill` whose files are gone after the block."""
    try:
        yield Spill(folder, parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
