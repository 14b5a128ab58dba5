"""Rows in a list column of a parquet file, read by row group."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import InputError
from snipdedup.features.formats import Shard, Stamp, stamp_of
from snipdedup.storage.remote import arrow_source


class ParquetShard(Shard):
    """A list column of a parquet file; rows are read by row group."""

    def __init__(self, path: Path, column: str | None) -> None:
        file = open_parquet(path)
        schema = file.schema_arrow
        self.column = column or only_list_column(path, schema)
        if self.column not in schema.names:
            raise InputError(f"{path}: no column {self.column!r}; it has {', '.join(schema.names)}")
        kind = schema.field(self.column).type
        values = list_value_type(kind)
        if values is None:
            raise InputError(f"{path}: column {self.column!r} is {kind}, not a list of floats")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self.group_starts = np.cumsum([0, *sizes], dtype=np.int64)
        rows = int(self.group_starts[-1])
        dim = getattr(kind, "list_size", None)
        if dim is None:
            dim = self._first_length(path, file) if rows else 0
        super().__init__(path, (rows, dim), np.dtype(f"f{values.bit_width // 8}"))

    def _first_length(self, path: Path, file: Any) -> int:
        try:
            row = next(file.iter_batches(1, columns=[self.column])).column(0)[0].as_py()
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: row 0 cannot be read: {error}; fetch it again") from error
        if row is None:
            raise InputError(
                f"{path}: row 0 of column {self.column!r} is null, expected a list of floats"
            )
        return len(row)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        for first, values in self._groups(start, stop):
            low, high = max(start, first), min(stop, first + len(values))
            out[low - start : high - start] = values[low - first : high - first]

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        if len(rows):
            for first, values in self._groups(int(rows[0]), int(rows[-1]) + 1):
                low, high = np.searchsorted(rows, [first, first + len(values)])
                out[low:high] = values[rows[low:high] - first]

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of each row group that overlaps ``start`` to ``stop``."""
        stamp = stamp_of(self.path)
        low = int(np.searchsorted(self.group_starts, start, side="right")) - 1
        high = int(np.searchsorted(self.group_starts, stop))
        for group in range(low, high):
            yield int(self.group_starts[group]), _row_group(self, group, stamp)

    def decode_group(self, group: int) -> np.ndarray:
        """Return the rows of a row group, (n, dim).

        Raises
        ------
        InputError
            If they cannot be read; or for the first row that is null, holds a null, or has another
            length.
        """
        import pyarrow.compute as pc

        first, end = self.group_starts[group : group + 2].tolist()
        try:
            column = open_parquet(self.path).read_row_group(group, columns=[self.column]).column(0)
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{self.path}: rows {first} to {end} cannot be read: {error}; fetch or write it "
                "again"
            ) from error

        def refuse(row: int, what: str) -> InputError:
            return InputError(f"{self.path}: row {first + row} of column {self.column!r} {what}")

        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
        wrong = np.flatnonzero(lengths != self.dim)
        if len(wrong):
            length = lengths[wrong[0]]
            what = "null" if length < 0 else f"a list of {length}"
            raise refuse(wrong[0], f"is {what}, expected {self.dim} values")
        values = pc.list_flatten(column)
        if values.null_count:
            at = int(np.flatnonzero(pc.is_null(values).to_numpy())[0])
            raise refuse(at // self.dim, "holds a null value")
        return np.asarray(values.to_numpy().reshape(-1, self.dim).astype(self.dtype, copy=False))


@lru_cache(maxsize=2)
def _row_group(shard: ParquetShard, group: int, stamp: Stamp) -> np.ndarray:
    del stamp
    return shard.decode_group(group)


def open_parquet(path: Path) -> Any:
    """Return ``pyarrow.parquet.ParquetFile``, or refuse the file by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(arrow_source(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: truncated or not a parquet file: {error}") from error


def list_value_type(kind: Any) -> Any:
    """Return the float type inside an arrow list type, None for any other type."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list and types.is_floating(kind.value_type) else None


def only_list_column(path: Path, schema: Any) -> str:
    """Return the name of the one list column of floats; refuse none or several."""
    names = [field.name for field in schema if list_value_type(field.type) is not None]
    if len(names) != 1:
        found = f"several: {', '.join(names)}" if names else f"none among {', '.join(schema.names)}"
        raise InputError(
            f"{path}: expected one list column of floats, found {found}; name it with --column"
        )
    return str(names[0])
