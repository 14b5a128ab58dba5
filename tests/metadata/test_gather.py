"""Columns of rows in any order equal indexing, however the rows are split over files."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.errors import SnipError
from snipdedup.metadata import gather
from snipdedup.metadata.gather import TableSlices, gather_column
from snipdedup.metadata.tables import as_texts, open_metadata
from snipdedup.storage import external_sort

ROWS = 1000
TEXTS = [None if n % 9 == 0 else "ü" * (n % 4) + str(n // 2) for n in range(ROWS)]
CUTS = np.array([0, 100, 100, 450, 700])  # the second slice has no rows


@pytest.mark.parametrize("memory", [20, 10**6])
def test_slices_of_rows_in_any_order(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(gather, "FLUSH_ROWS", memory)
    monkeypatch.setattr(external_sort, "HELD", memory)
    table = pa.table({"t": pa.array(TEXTS), "n": np.arange(ROWS)})
    (tmp_path / "m").mkdir()
    for number, start in enumerate(range(0, ROWS, 300)):
        path = tmp_path / "m" / f"m_{number}.parquet"
        pq.write_table(table.slice(start, 300), path, row_group_size=70)
    rows = np.random.default_rng(0).permutation(ROWS)[: CUTS[-1]]
    metadata, work = open_metadata(tmp_path / "m"), tmp_path / "w"
    work.mkdir()
    (work / "00000.arrows").write_bytes(b"of a stopped run")
    with closing(gather_column(metadata, "t", rows, CUTS, as_texts, work)) as found:
        slices = list(found)
    assert not work.exists()
    assert slices[1] is None
    for values, start, stop in zip(slices, CUTS[:-1], CUTS[1:], strict=True):
        if values is not None:
            assert values.to_pylist() == [TEXTS[row] for row in rows[start:stop]]


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_temporary_file_that_was_damaged_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(gather, "FLUSH_ROWS", 1)
    slices = TableSlices(tmp_path / "s", np.array([0, 1000, 1000]))
    slices.add(pa.RecordBatch.from_pydict({"place": np.arange(1000)}))
    path = tmp_path / "s" / "00000.arrows"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    else:
        path.unlink()
    assert slices.read(1) is None
    with pytest.raises(SnipError, match=r"00000\.arrows: a temporary file cannot be read back"):
        slices.read(0)
