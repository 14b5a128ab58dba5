"""Keep rules by column: which copy stays is decided by what the metadata says of it.

Only the columns that the rules name are read, and of those only rows that are in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.config import keep_rules
from snipdedup.errors import SnipError, UsageError
from snipdedup.groups.members import Rank, keep_rank
from snipdedup.metadata.files import Table
from snipdedup.metadata.precheck import Use
from snipdedup.metadata.tables import Metadata, named
from snipdedup.storage.external_sort import Columns

NULL = np.uint64(2**64 - 1)  # after all values, ascending or descending
SIGN = np.uint64(1 << 63)


def rank_by(keep: str, seed: int, metadata: Metadata | None) -> Rank:
    """Return the function that gives rows their place in keep order, among those it is asked of.

    Parameters
    ----------
    keep : str
        As ``--keep``: ``max:COLUMN``, ``min:COLUMN``, several in order by comma; at the end, for
        rows that are still even, ``first`` (without it too), ``last`` or ``random``.
    seed : int
    metadata : Metadata or None
        Needed where ``keep`` names columns.

    Raises
    ------
    UsageError
        If columns are named and there is no metadata.
    SnipError
        If a column is not there (its columns are listed) or cannot be ordered.
    """
    rules, last = keep_rules(keep)
    if not rules:
        return partial(keep_rank, keep=last, seed=seed)
    if metadata is None:
        raise UsageError(f"--keep {keep} names columns of the metadata: give --metadata too")
    return ColumnRank(metadata, rules, last, seed)


class ColumnRank:
    """Keep order by columns of the metadata, then by the place of rows.

    Parameters
    ----------
    metadata : Metadata
    rules : list of (str, str)
        ``max`` or ``min``, and a column.
    last, seed
        As `keep_rank` takes them, for rows that are still even.
    """

    def __init__(
        self, metadata: Metadata, rules: list[tuple[str, str]], last: str, seed: int
    ) -> None:
        self.metadata, self.last, self.seed = metadata, last, seed
        self.columns = [metadata.column(name) or name for _, name in rules]
        self.kinds = [common_kind(metadata, column) for column in self.columns]
        self.ways = [way for way, _ in rules]
        self.known: tuple[np.ndarray, ...] | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return each row's place among these, (n,) uint64."""
        wanted, back = np.unique(rows, return_inverse=True)
        if self.known is None:
            keys = self._read(self.metadata.pick(self._names(), wanted), len(wanted))
        else:
            keys = [column[wanted] for column in self.known]
        order = np.lexsort((keep_rank(wanted, self.last, self.seed), *reversed(keys)))
        place = np.empty(len(wanted), np.uint64)
        place[order] = np.arange(len(wanted), dtype=np.uint64)
        return place[back]

    def use(self) -> Use:
        """Return what the columns are read for."""
        remedy = "name columns of numbers or dates with --keep, or keep the first or last row"
        return Use(self._names(), self._keys, remedy)

    def keep_keys(self, folder: Path) -> None:
        """Read the columns once for all that will be asked; what is long is mapped."""
        names = [f"key{number}" for number in range(self._width())]
        columns = Columns(folder / "keep", dict.fromkeys(names, "<u8"))
        for file, _, batch in self.metadata.read(self._names()):
            columns.add(*self._keys(file, batch))
        self.known = columns.arrays()

    def _names(self) -> list[str]:
        return list(dict.fromkeys(self.columns))

    def _width(self) -> int:
        return len(self.kinds) + self.kinds.count(None)

    def _read(self, found: Iterator[tuple[Table, slice, Any]], count: int) -> list[np.ndarray]:
        keys = [np.empty(count, np.uint64) for _ in range(self._width())]
        for file, which, batch in found:
            for key, part in zip(keys, self._keys(file, batch), strict=True):
                key[which] = part
        return keys

    def _keys(self, file: Table, batch: Any) -> list[np.ndarray]:
        """Return of each rule a number a row, (n,) uint64, the smallest for the row to keep.

        Of one whose files differ in their types, two: the second decides where the first is equal.
        """
        keys = []
        for column, kind, way in zip(self.columns, self.kinds, self.ways, strict=True):
            try:
                values = batch.column(self._names().index(column))
                wanted = own_kind(values.type) if kind is None else kind
                values = values.cast(wanted, safe=False)
            except (pa.ArrowException, NotImplementedError) as error:
                raise SnipError(
                    f"{file.path}: column {column!r} is {batch.column(column).type}, expected "
                    f"numbers, dates or times of day with dates, to keep rows by: {error}"
                ) from error
            keys.append(ordered(values, descending=way == "max", mixed=kind is None))
            if kind is None:
                keys.append(ordered(beyond_float(values), descending=way == "max"))
        return keys


def common_kind(metadata: Metadata, column: str) -> Any:
    """Return the arrow type in which a column's values are compared, over all files.

    None where no one type holds the numbers of all files without loss, of int64, uint64 and
    float64: each file's are then compared as `own_kind`, exactly. Decimals become float64.
    """
    kinds = [file.schema.field(column).type for file in metadata.files]
    kinds = [kind for kind in kinds if not pa.types.is_null(kind)]
    tests: tuple[tuple[Callable[[Any], bool], Any], ...] = (
        (pa.types.is_temporal, pa.timestamp("us")),
        (is_whole, pa.int64()),
        (lambda kind: kind == pa.uint64(), pa.uint64()),
        (lambda kind: is_number(kind) and own_kind(kind) == pa.float64(), pa.float64()),
        (is_number, None),
    )
    for fits, common in tests:
        if all(map(fits, kinds)):
            return common
    found = " and ".join(map(str, dict.fromkeys(kinds)))
    raise SnipError(
        f"{named(metadata.files)}: column {column!r} is {found}, expected numbers, or dates, to "
        "keep rows by"
    )


def is_whole(kind: Any) -> bool:
    """Tell whether values of an arrow type are whole numbers that int64 holds."""
    return bool(pa.types.is_boolean(kind) or (pa.types.is_integer(kind) and kind != pa.uint64()))


def own_kind(kind: Any) -> Any:
    """Return the arrow type, of int64, uint64 and float64, that holds numbers of another type."""
    if pa.types.is_null(kind) or is_whole(kind):
        return pa.int64()
    return pa.uint64() if kind == pa.uint64() else pa.float64()


def is_number(kind: Any) -> bool:
    """Tell whether values of an arrow type are numbers."""
    return is_whole(kind) or bool(
        kind == pa.uint64() or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def ordered(values: Any, *, descending: bool, mixed: bool = False) -> np.ndarray:
    """Return numbers that are ordered as an arrow array's values are; null and NaN come last.

    Parameters
    ----------
    values : pyarrow.Array of timestamp, int64, uint64 or float64
    descending : bool
        The largest value has the smallest number.
    mixed : bool
        Order whole numbers as the float64 next to them, beside others' float64; what that leaves
        out is `beyond_float`.

    Returns
    -------
    (n,) uint64
    """
    kind = pa.int64() if pa.types.is_timestamp(values.type) else values.type
    missing = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    plain = values.cast(kind).fill_null(0).to_numpy(zero_copy_only=False)
    if mixed or kind == pa.float64():
        plain = plain.astype(np.float64, copy=False)
        bits = (plain + 0.0).view(np.uint64)  # -0 becomes 0
        key = np.where(bits & SIGN, ~bits, bits | SIGN)
    else:
        key = plain.astype(np.uint64) ^ (SIGN if kind == pa.int64() else np.uint64(0))
    key = np.minimum(~key if descending else key, NULL - np.uint64(1))
    key[missing] = NULL
    return key


def beyond_float(values: Any) -> Any:
    """Return by how much values exceed the float64 next to them; null where they are null.

    Rounding to float64 never turns the order of two numbers, so this decides where it makes them
    equal.

    Parameters
    ----------
    values : pyarrow.Array of int64, uint64 or float64

    Returns
    -------
    pyarrow.Array of int64
    """
    plain = values.fill_null(0).to_numpy(zero_copy_only=False)
    rest = np.zeros(len(plain), np.int64)
    if plain.dtype != np.float64:
        near = plain.astype(np.float64)
        inside = np.where(near < 2.0**64, near, 0)  # modulo 2**64, as the difference is
        whole = inside.clip(min=0).astype(np.uint64) + inside.clip(max=0).astype(np.int64).view(
            np.uint64
        )
        rest = (plain.astype(np.uint64) - whole).view(np.int64)
    return pa.array(rest, mask=np.asarray(values.is_null()))
