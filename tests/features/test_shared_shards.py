"""Shards of two inputs that are one file, one array, or copies."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from snipdedup.features import hashing
from snipdedup.features.hashing import SharedShard, find_shared
from snipdedup.features.shards import open_features
from snipdedup.storage.remote import RemotePath


def shards(*paths):
    return open_features([str(path) for path in paths]).shards


@pytest.fixture
def files(tmp_path):
    """Shards of one size and shape; number 5 is a copy of number 1."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.npy" for number in range(6)]
    for path in paths:
        np.save(path, rng.standard_normal((600, 8)).astype(np.float32))
    paths[5].write_bytes(paths[1].read_bytes())
    return paths


def test_files_that_differ_are_told_apart_by_two_rows(files):
    with mock.patch.object(hashing, "shard_checksum", side_effect=AssertionError):
        assert find_shared(shards(*files[:3]), shards(*files[3:5])) is None


def test_a_copy_is_found_and_one_that_differs_in_a_byte_is_none(files):
    assert find_shared(shards(*files[:3]), shards(*files[3:])) == SharedShard(1, 2, True)
    data = bytearray(files[5].read_bytes())
    data[200] ^= 1
    files[5].write_bytes(data)
    assert find_shared(shards(*files[:3]), shards(*files[3:])) is None


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_other_formats_too(files, tmp_path, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [tmp_path / f"{name}.{suffix}" for name in ("one", "other", "third")]
    for path, number in zip(paths, (1, 5, 2), strict=True):
        x = np.load(files[number])
        if suffix == "npz":
            np.savez(path, x)
        else:
            pq.write_table(pa.table({"x": list(x)}), path)
    assert find_shared(shards(paths[0]), shards(*paths[2:])) is None
    assert find_shared(shards(files[1]), shards(*paths)) == SharedShard(0, 0, True)
    paths[1].write_bytes(paths[0].read_bytes())
    assert find_shared(shards(paths[0]), shards(paths[2], paths[1])) == SharedShard(0, 1, True)


def test_a_few_equal_rows_are_no_copy(tmp_path):
    x = np.eye(40)
    for rows, expected in (
        (hashing.FEW_ROWS - 1, None),
        (hashing.FEW_ROWS, SharedShard(0, 0, True)),
    ):
        np.save(tmp_path / "a.npy", x[:rows])
        np.save(tmp_path / "b.npy", x[:rows])
        assert find_shared(shards(tmp_path / "a.npy"), shards(tmp_path / "b.npy")) == expected


def test_arrays_are_one_where_they_share_memory_or_rows(files):
    x = np.random.default_rng(1).standard_normal((600, 8)).astype(np.float32)

    def find(one, *others):
        return find_shared(open_features([one]).shards, open_features(list(others)).shards)

    assert find(x, x[:, ::-1], x) == SharedShard(0, 0, False)
    assert find(x[:300], x[300:], x[299:500]) == SharedShard(0, 1, False)
    assert find(x[::2], x[1::2]) is None
    assert find(x, x + 1, x.copy()) == SharedShard(0, 1, True)
    assert find(np.load(files[1]), str(files[0]), str(files[5])) == SharedShard(0, 1, True)
    changed = x.copy()
    changed[7, 3] += 1
    assert find(x, changed) is None


def test_urls_are_told_apart_by_what_they_name():
    def names(url):
        return list(hashing.names_of(SimpleNamespace(path=RemotePath(url))))

    url = "https://host.org/set/img_emb_0.npy"
    for other in (url, "HTTPS://me:secret@HOST.org/set/img_emb_0.npy"):
        assert names(url) == names(other)
    for other in (
        "https://host.org/set/img_emb_1.npy",
        f"{url}?version=2",
        "s3://set/img_emb_0.npy",
    ):
        assert names(url) != names(other)
