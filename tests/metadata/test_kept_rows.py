"""Rows of feature files that stay: numpy's own indexing says which bytes those are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.errors import SnipError
from snipdedup.metadata import kept_rows
from snipdedup.metadata.kept_rows import feature_rows, write_kept_features

RNG = np.random.default_rng(0)
STAY = RNG.random(75) < 0.6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kept_rows, "FEATURE_ROWS", 10)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("stay", [STAY, np.zeros(75, bool), np.ones(75, bool)])
def test_one_array(tmp_path, dtype, stay):
    rows = RNG.standard_normal((75, 6)).astype(dtype)
    np.save(tmp_path / "a.npy", rows)
    assert feature_rows(tmp_path / "a.npy") == 75
    write_kept_features(tmp_path / "a.npy", tmp_path / "kept" / "a.npy", ~stay)
    found = np.load(tmp_path / "kept" / "a.npy")
    np.testing.assert_array_equal(found, rows[stay])
    assert found.dtype == rows.dtype.newbyteorder("=")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_of_an_archive(tmp_path, save):
    arrays = {
        "b32_img": RNG.standard_normal((75, 5)).astype(np.float16),
        "l14_img": RNG.standard_normal((75, 7)).astype(np.float32),
    }
    save(tmp_path / "a.npz", **arrays)
    assert feature_rows(tmp_path / "a.npz") == 75
    write_kept_features(tmp_path / "a.npz", tmp_path / "b.npz", ~STAY)
    with np.load(tmp_path / "b.npz") as found:
        assert sorted(found.files) == sorted(arrays)
        for name, rows in arrays.items():
            np.testing.assert_array_equal(found[name], rows[STAY])
            assert found[name].dtype == rows.dtype
    assert feature_rows(tmp_path / "b.npz") == np.count_nonzero(STAY)


def test_parquet(tmp_path):
    rows = RNG.standard_normal((75, 4)).astype(np.float32)
    pq.write_table(pa.table({"e": rows.tolist(), "key": range(75)}), tmp_path / "a.parquet")
    write_kept_features(tmp_path / "a.parquet", tmp_path / "kept" / "a.parquet", ~STAY)
    found = pq.read_table(tmp_path / "kept" / "a.parquet")
    assert found["key"].to_pylist() == np.flatnonzero(STAY).tolist()
    assert feature_rows(tmp_path / "kept" / "a.parquet") == np.count_nonzero(STAY)


def test_arrays_of_unlike_length_and_broken_archives_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", one=np.zeros((3, 2)), two=np.zeros((4, 2)))
    with pytest.raises(SnipError, match="one row for each image, found one 3, two 4"):
        feature_rows(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz")
    with pytest.raises(SnipError, match="found no array"):
        feature_rows(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(SnipError, match=r"truncated or not an \.npz archive"):
        feature_rows(tmp_path / "c.npz")
