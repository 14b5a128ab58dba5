"""Keep rules (``--keep``): which of a group's copies is kept.

A rule gives each row a rank; the row of the smallest rank is kept. `keep_rank` ranks by row number
(first, last, random), `ColumnRank` by columns of the metadata (max:COLUMN, min:COLUMN).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.commands import keep_rules
from snipdedup.errors import SnipError, UsageError
from snipdedup.groups.members import Rank
from snipdedup.metadata.tables import ColumnUse, Metadata, Table
from snipdedup.storage.external_sort import Columns

MISSING = np.uint64(2**64 - 1)  # the rank of null and NaN: after all values, ascending or not
SIGN = np.uint64(1 << 63)
AS_NUMBER, AS_TIME = "number", "time such as 2024-05-31T18:00:00"  # what a text may be
OFFSET = r":\d\d.*(Z|[+-]\d\d(:?\d\d)?)$"  # from UTC, at the end of a time


def rank_by(keep: str, seed: int, metadata: Metadata | None) -> Rank:
    """Return a function of rows (n,) that returns the rank of each among these, (n,) uint64.

    ``keep`` is ``--keep``: ``max:COLUMN``, ``min:COLUMN``, several in order by comma; last, for
    rows that are still equal, ``first`` (the default), ``last`` or ``random``.
    """
    rules, last = keep_rules(keep)
    if not rules:
        return partial(keep_rank, keep=last, seed=seed)
    if metadata is None:
        raise UsageError(f"--keep {keep} names columns of the metadata: give --metadata too")
    return ColumnRank(metadata, rules, last, seed)


def keep_rank(rows: np.ndarray, keep: str, seed: int) -> np.ndarray:
    """Return the place of each row in keep order, (n,) uint64; the row with the smallest is kept.

    ``random`` is a hash of seed and row (splitmix64), the same wherever the row is met. It is a
    bijection, so no two rows tie.
    """
    rank = rows.astype(np.uint64)
    if keep == "last":
        return ~rank
    if keep == "random":
        with np.errstate(over="ignore"):
            rank += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                rank = (rank ^ (rank >> np.uint64(shift))) * np.uint64(factor)
            rank ^= rank >> np.uint64(31)
    return rank


class ColumnRank:
    """Ranks by columns of the metadata; only these are read.

    ``rules`` are pairs of ``max`` or ``min`` and a column; rows that are still equal are ranked by
    `keep_rank`.
    """

    def __init__(
        self, metadata: Metadata, rules: list[tuple[str, str]], last: str, seed: int
    ) -> None:
        self.metadata, self.last, self.seed = metadata, last, seed
        self.rules = [(str(metadata.column(name)), way == "max") for way, name in rules]
        self.names = list(dict.fromkeys(column for column, _ in self.rules))
        for column in self.names:
            refuse_unordered(metadata, column)
        self.width = 2 * len(rules)  # numbers a row
        self.known: tuple[np.ndarray, ...] | None = None
        self.parsed: dict[str, str] = {}  # of columns of texts: what they are

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return each row's rank among these, (n,) uint64."""
        wanted, back = np.unique(rows, return_inverse=True)
        if self.known is None:
            ranks = np.empty((self.width, len(wanted)), np.uint64)
            for file, which, batch in self.metadata.pick(self.names, wanted):
                ranks[:, which] = self._ranks(file, wanted[which], batch)
        else:
            ranks = np.array([column[wanted] for column in self.known])
        order = np.lexsort((keep_rank(wanted, self.last, self.seed), *ranks[::-1]))
        place = np.empty(len(wanted), np.uint64)
        place[order] = np.arange(len(wanted), dtype=np.uint64)
        return place[back]

    def use(self) -> ColumnUse:
        """Return what the columns are read for."""
        remedy = "name columns of numbers or dates with --keep, or keep the first or last row"
        return ColumnUse(self.names, self._ranks, remedy)

    def read_all(self, folder: Path) -> None:
        """Read the columns once, before many calls; long ones are mapped from files."""
        names = [f"rank{number}" for number in range(self.width)]
        columns = Columns(folder / "keep", dict.fromkeys(names, "<u8"))
        for file, first, batch in self.metadata.read(self.names):
            columns.add(*self._ranks(file, first, batch))
        self.known = columns.arrays()

    def _ranks(self, file: Table, rows: int | np.ndarray, batch: Any) -> list[np.ndarray]:
        """Return two numbers a row for each rule, see `order_keys`.

        ``rows`` are the global rows of the batch, or the first of them.
        """
        ranks = []
        for column, descending in self.rules:
            values = batch.column(self.names.index(column))
            if file.is_text or is_texts(values.type):
                values = self._parse(file, column, values.cast(pa.string()), rows)
            try:
                values = values.cast(compared_type(values.type), safe=False)
            except (pa.ArrowException, NotImplementedError) as error:
                raise SnipError(
                    f"{file.path}: column {column!r} is {values.type}, expected numbers, dates or "
                    f"times of day with dates, to keep rows by: {error}"
                ) from error
            ranks += order_keys(values, descending)
        return ranks

    def _parse(self, file: Table, column: str, texts: Any, rows: int | np.ndarray) -> Any:
        """Return texts as times, or those of a CSV as numbers or times; empty ones as null.

        The first text of a column says which; the first that is of another kind is refused.
        """
        import pyarrow.compute as pc  # here: it takes a tenth of a second to load

        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        known = texts.drop_null()
        if not len(known):
            return pa.nulls(len(texts), pa.float64())
        if column not in self.parsed:
            kinds = [AS_NUMBER, AS_TIME] if file.is_text else [AS_TIME]
            fitting = [kind for kind in kinds if parsed(known[:1], kind) is not None]
            self.parsed[column] = (fitting or kinds)[0]
        kind = self.parsed[column]
        values = parsed(texts, kind)
        if values is None:
            rows = rows + np.arange(len(texts)) if isinstance(rows, int) else rows
            for row, text in zip(rows.tolist(), texts.to_pylist(), strict=True):
                if parsed(pa.array([text], pa.string()), kind) is None:
                    raise SnipError(
                        f"{self.metadata.place(row)}: column {column!r} is {text!r}, expected a "
                        f"{kind} to keep rows by"
                    )
        return values


def parsed(texts: Any, kind: str) -> Any:
    """Return texts, (n,), as float64, or as timestamps in UTC; None where one is of another kind.

    A time without an offset from UTC is taken as one of UTC.
    """
    import pyarrow.compute as pc  # here: it takes a tenth of a second to load

    try:
        if kind == AS_NUMBER:
            return texts.cast(pa.float64())
        texts = pc.replace_substring_regex(texts, r"(\.\d{6})\d+", r"\1")  # to microseconds
        with_offset = pc.fill_null(pc.match_substring_regex(texts, OFFSET), False)
        plain = pc.if_else(with_offset, None, texts).cast(pa.timestamp("us"))
        shifted = pc.if_else(with_offset, texts, None).cast(pa.timestamp("us", "UTC"))
        return pc.coalesce(plain, shifted.cast(pa.timestamp("us")))
    except pa.ArrowInvalid:
        return None


def refuse_unordered(metadata: Metadata, column: str) -> None:
    """Refuse a column that holds neither numbers in all files, nor dates in all of them.

    What texts hold is seen when they are read.
    """
    kinds = [file.schema.field(column).type for file in metadata.files if not file.is_text]
    kinds = [kind for kind in kinds if not pa.types.is_null(kind)]
    compared = {compared_type(kind) for kind in kinds}
    if None in compared or (pa.timestamp("us") in compared and len(compared) > 1):
        found = " and ".join(map(str, dict.fromkeys(kinds)))
        raise SnipError(
            f"{metadata.describe()}: column {column!r} is {found}, expected numbers, or dates, to "
            "keep rows by"
        )


def is_texts(kind: Any) -> bool:
    """Tell whether an arrow type is one of texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def compared_type(kind: Any) -> Any:
    """Return the arrow type as which values are compared; None where they have no such order."""
    types = pa.types
    if types.is_temporal(kind) or is_texts(kind):
        return pa.timestamp("us")
    if types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind):
        return kind if kind == pa.uint64() else pa.int64()
    return pa.float64() if types.is_floating(kind) or types.is_decimal(kind) else None


def order_keys(values: Any, descending: bool) -> list[np.ndarray]:
    """Return two numbers a value, (n,) uint64 each: by the first they are ordered, then the second.

    ``values`` are timestamps, int64, uint64 or float64. The first number has the order of the
    float64 next to a value: rounding never turns the order of two numbers. The second has that of
    what the value exceeds it by, so files of any of these types are compared exactly.
    ``descending``: the largest value has the smallest numbers. Null and NaN come last in any case.
    """
    missing = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    kind = pa.int64() if pa.types.is_timestamp(values.type) else values.type
    plain = values.cast(kind).fill_null(0).to_numpy(zero_copy_only=False)
    near, rest = plain.astype(np.float64), np.zeros(len(plain), np.uint64)
    if plain.dtype != np.float64:
        wrapped = np.where(near >= 2.0**63, near - 2.0**64, near)  # modulo 2^64, as the difference
        rest = plain.astype(np.uint64) - wrapped.astype(np.int64).view(np.uint64)
    bits = (near + 0.0).view(np.uint64)  # -0 becomes 0
    keys = []
    for order in (np.where(bits & SIGN, ~bits, bits | SIGN), rest ^ SIGN):
        key = np.minimum(~order if descending else order, MISSING - np.uint64(1))
        key[missing] = MISSING
        keys.append(key)
    return keys
