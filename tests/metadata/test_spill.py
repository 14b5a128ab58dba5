"""Rows split over files come back whole, in order, each in its part."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from snipdedup.errors import SnipError
from snipdedup.metadata import spill


@pytest.mark.parametrize("flush", [1, 100, 10**6])
def test_each_part_keeps_the_order_of_its_rows(tmp_path, monkeypatch, flush):
    monkeypatch.setattr(spill, "FLUSH_ROWS", flush)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 1000)
    label[label == 3] = 4  # a part may be empty
    texts = [None if n % 9 == 0 else "ü" * (n % 4) for n in range(1000)]
    with spill.spilling(tmp_path / "s", 5) as held:
        for start in range(0, 1000, 70):
            cut = slice(start, start + 70)
            batch = pa.RecordBatch.from_pydict(
                {"n": np.arange(1000)[cut], "t": pa.array(texts[cut])}
            )
            held.add(label[cut], batch)
        for part in range(5):
            want = np.flatnonzero(label == part)
            found = held.read(part)
            if part == 3:
                assert found is None
                continue
            assert found["n"].to_pylist() == want.tolist()
            assert found["t"].to_pylist() == [texts[n] for n in want]
    assert not (tmp_path / "s").exists()


def test_what_a_stopped_run_left_is_gone(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "00000.arrows").write_bytes(b"old")
    with spill.spilling(tmp_path / "s", 1) as held:
        assert held.read(0) is None


def test_a_cut_part_is_refused(tmp_path):
    with spill.spilling(tmp_path / "s", 1) as held:
        held.add(np.zeros(1000, np.int64), pa.RecordBatch.from_pydict({"n": np.arange(1000)}))
        held.flush()
        path = tmp_path / "s" / "00000.arrows"
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(SnipError, match=r"00000\.arrows: what was put there cannot be read"):
            held.read(0)


def test_a_part_that_is_gone_is_refused(tmp_path):
    with spill.spilling(tmp_path / "s", 2) as held:
        held.add(np.zeros(10, np.int64), pa.RecordBatch.from_pydict({"n": np.arange(10)}))
        held.flush()
        (tmp_path / "s" / "00000.arrows").unlink()
        assert held.read(1) is None
        with pytest.raises(SnipError, match=r"00000\.arrows: what was put there cannot be read"):
            held.read(0)


def test_parts_grow_with_the_rows():
    assert spill.parts_for(0) == spill.parts_for(1) == spill.parts_for(spill.PART_ROWS) == 1
    assert spill.parts_for(spill.PART_ROWS + 1) == 2
    assert spill.parts_for(10**9) == 239
    assert spill.parts_for(10**12) == spill.MOST_PARTS
