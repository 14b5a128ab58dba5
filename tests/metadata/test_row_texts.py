"""Texts of a few rows, from the metadata given to a run, or from that of the rows that stay."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.errors import SnipError
from snipdedup.metadata.gather import CAPTIONS, URLS, open_row_texts, removed_before
from snipdedup.storage.out_folder import read_manifest

ROWS = 200
ASKED = np.array([199, 3, 50, 3, 120])


@pytest.fixture
def finished(tmp_path):
    """A finished OUT beside its set."""
    rows = truth.clustered(ROWS, 16, 2, noise=0.1)
    truth.save_shards(tmp_path / "set" / "img_emb", rows, [70])
    (tmp_path / "set" / "metadata").mkdir()
    for number, (start, stop) in enumerate(((0, 70), (70, ROWS))):
        texts = [None if row == 50 else f"caption {row}" for row in range(start, stop)]
        table = pa.table({"TEXT": texts, "url": [f"u{row}" for row in range(start, stop)]})
        pq.write_table(table, tmp_path / "set" / "metadata" / f"m_{number}.parquet")
    words = (tmp_path / "set", "--threshold", 0.9, "--out", tmp_path / "out")
    assert truth.snip("dedup", *words)[0] == 0
    return tmp_path


def texts_of(folder, asked=None):
    return open_row_texts(folder / "out", read_manifest(folder / "out", "dedup"), asked)


def test_captions_by_row_in_any_order(finished):
    texts = texts_of(finished)
    assert texts.find(None, CAPTIONS) == "TEXT"
    assert texts.find(None, URLS) == "url"
    assert texts.read("TEXT", ASKED) == {r: f"caption {r}" for r in (3, 120, 199)}  # 50 is null
    assert texts.read("url", ASKED)[50] == "u50"
    assert texts.read(None, ASKED) == {}
    with pytest.raises(SnipError, match="column 'none' is not there"):
        texts.find("none")


@pytest.mark.parametrize("lost", ["gone", "changed", "shorter"])
def test_of_a_lost_table_the_rows_that_stay_are_known(finished, lost):
    path = finished / "set" / "metadata" / "m_1.parquet"
    if lost == "gone":
        shutil.rmtree(path.parent)
    elif lost == "changed":  # as many rows, but perhaps of other pictures
        table = pa.table({"TEXT": ["other"] * (ROWS - 70), "url": ["x"] * (ROWS - 70)})
        pq.write_table(table, path)
    else:
        pq.write_table(pq.read_table(path).slice(1), path)
    texts = texts_of(finished)
    is_dup = np.load(finished / "out" / "is_dup.npy")
    every = np.arange(ROWS)
    assert texts.read("url", every) == {r: f"u{r}" for r in every[~is_dup].tolist()}
    assert is_dup.sum() > 20


def test_without_any_table_nothing_is_known(finished):
    shutil.rmtree(finished / "set" / "metadata")
    shutil.rmtree(finished / "out" / "metadata")
    texts = texts_of(finished)
    assert texts.find("anything") is None
    assert texts.read("url", ASKED) == {}


def test_a_table_that_is_named_must_match(finished):
    moved = finished / "moved"
    (finished / "set" / "metadata").rename(moved)
    assert texts_of(finished, str(moved)).read("url", ASKED)[199] == "u199"
    (moved / "m_1.parquet").unlink()
    with pytest.raises(SnipError, match="70 rows of metadata, but 200 rows"):
        texts_of(finished, str(moved))


def test_removed_before_by_hand():
    is_dup = np.array([1, 0, 1, 1, 0, 0], bool)
    assert removed_before(is_dup, np.array([1, 4, 5])).tolist() == [1, 3, 3]
    assert removed_before(is_dup, np.empty(0, np.int64)).tolist() == []
