"""Rows by their keys: where a command takes a row number, it takes a key.

Keys are read once, in a stream: those of the metadata; where that is gone or holds the kept rows
only, those of ``groups.parquet`` too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.metadata.gather import RowTexts, kept_rows
from snipdedup.metadata.tables import ANY_KEY, BATCH_ROWS, as_texts, stream_parquet

ROW, KEY = "row:", "key:"
SAMPLE = 20_000  # keys that an unknown one is compared with, at the most
MOST_ROWS = 100  # of one key


def row_number(name: Any) -> int | None:
    """Return the row that a name is the number of, None of a key.

    A text with zeros in front, such as 000000123, is a key.
    """
    if not isinstance(name, str):
        return int(name)
    text = name.removeprefix(ROW)
    if re.fullmatch("0|[1-9][0-9]{0,18}", text):
        return int(text)
    if text != name:
        raise SnipError(f"{name!r}: expected a row number after {ROW}, such as {ROW}123")
    return None


@dataclass(frozen=True)
class Keys:
    """The keys of a set of ``rows`` rows: in ``column`` of its metadata, or in ``groups``."""

    where: Path  # as messages name the set
    rows: int
    texts: RowTexts
    column: str | None
    groups: Path | None = None

    def find(self, asked: Any) -> list[int]:
        """Return the rows that row numbers and keys name, each once, in the order asked.

        ``asked`` is one name, several by comma, or a list. A number that is both is a row. All rows
        of a key are returned. Refused are unknown keys, and those of more than `MOST_ROWS` rows.
        """
        names = list(asked) if isinstance(asked, list | tuple | np.ndarray) else [asked]
        if isinstance(asked, str):
            names = [word.strip() for word in asked.split(",") if word.strip()]
        whole = str(asked).removeprefix(KEY)
        numbers = [row_number(name) for name in names]
        inside = [number is not None and 0 <= number < self.rows for number in numbers]
        keys = [str(n).removeprefix(KEY) for n, row in zip(names, inside, strict=True) if not row]
        known = self.rows_of([*keys, whole]) if keys else {}
        if whole in known:  # a key may have commas
            return known[whole]
        found: dict[int, None] = {}
        for name, number, is_row in zip(names, numbers, inside, strict=True):
            key = str(name).removeprefix(KEY)
            if is_row or key in known:
                found |= dict.fromkeys([number or 0] if is_row else known[key])
            elif number is not None:
                raise SnipError(f"no row {number:,} in {self.where}: rows 0 to {self.rows - 1:,}")
            else:
                raise self.unknown(key)
        return list(found)

    def rows_of(self, keys: list[str]) -> dict[str, list[int]]:
        """Return the rows of each key that some row has, ascending."""
        import pyarrow.compute as pc  # here: it takes a tenth of a second to load

        wanted, kept, found = pa.array(keys, pa.string()), self.texts.is_dup, dict[str, list[int]]()
        for of_metadata, rows, texts in self._batches("finding keys"):
            hits = np.flatnonzero(pc.is_in(texts, value_set=wanted))
            for place in hits.tolist():
                same = found.setdefault(texts[place].as_py(), [])
                # Places among the kept rows become rows below, all at once.
                row = int(rows[place])
                same.append(~row if of_metadata and kept is not None else row)
                if len(same) > 2 * MOST_ROWS:
                    break
        if kept is not None:
            places = sorted({~row for rows in found.values() for row in rows if row < 0})
            rows = kept_rows(kept, np.array(places, np.int64)).tolist()
            of_place = dict(zip([~place for place in places], rows, strict=True))
            found = {key: [of_place.get(row, row) for row in rows] for key, rows in found.items()}
        for key, same in found.items():
            if len(set(same)) > MOST_ROWS:
                raise SnipError(
                    f"{self.where}: more than {MOST_ROWS} rows have the key {key!r}; name one of "
                    f"them, such as {ROW}{min(same)}"
                )
        return {key: sorted(set(same)) for key, same in found.items()}

    def unknown(self, key: str) -> SnipError:
        """Return the refusal of a key that no row has, with the nearest keys of a sample."""
        import pyarrow.compute as pc

        if self.column is None and self.groups is None:
            return SnipError(
                f"{key!r} is no row number, and no keys are known of {self.where}: name its "
                f"metadata with --metadata; columns of keys are {', '.join(ANY_KEY)}"
            )
        alike, others, begin = list[str](), list[str](), key[: len(key) // 2]
        step = max(1, self.rows // SAMPLE)
        for _, _, texts in self._batches("comparing keys"):
            known = texts.drop_null()
            near = known.filter(pc.starts_with(known, begin))
            alike += near.slice(0, max(0, SAMPLE - len(alike))).to_pylist()
            others += known.take(pa.array(np.arange(0, len(known), step))).to_pylist()
        close = difflib.get_close_matches(key, [*alike, *others[:SAMPLE]], 12)
        hint = ", ".join(map(repr, list(dict.fromkeys(close))[:3]))
        return SnipError(
            f"no row of {self.where} has the key {key!r}; the nearest keys: {hint}"
            if hint
            else f"no row of {self.where} has the key {key!r}, or one like it"
        )

    def _batches(self, doing: str) -> Iterator[tuple[bool, np.ndarray, Any]]:
        """Yield whether keys are the metadata's, their places in it or else rows, and the keys."""
        with progress.bar(self.rows, doing, "rows") as bar:
            if self.texts.metadata is not None and self.column is not None:
                for file, first, batch in self.texts.metadata.read([self.column]):
                    rows = np.arange(first, first + batch.num_rows)
                    yield True, rows, as_texts(file, self.column, batch.column(0))
                    bar.update(batch.num_rows)
            if self.groups is not None:
                batches = stream_parquet(self.groups).iter_batches(
                    BATCH_ROWS, columns=["row", "key"]
                )
                for batch in batches:
                    yield False, batch.column("row").to_numpy(), batch.column("key").cast("string")


def open_keys(
    where: Path, rows: int, texts: RowTexts, asked: str | None = None, groups: Path | None = None
) -> Keys:
    """Return the keys of a set: in the column ``asked``, else the first of `ANY_KEY`.

    ``groups`` is ``groups.parquet`` of a finished run; it is read where the metadata lacks rows.
    """
    column = texts.find(asked, ANY_KEY)
    whole = column is not None and texts.is_dup is None
    return Keys(where, rows, texts, column, None if whole else groups)


def find_run_rows(out: Path, manifest: dict[str, Any], texts: RowTexts, asked: Any) -> list[int]:
    """Return the rows of a finished run of ``snip dedup`` that are asked for, as `Keys.find`."""
    rows = sum(shard["rows"] for shard in manifest["shards"])
    key, groups = manifest["settings"].get("key"), out / "groups.parquet"
    return open_keys(out, rows, texts, key, groups).find(asked)
