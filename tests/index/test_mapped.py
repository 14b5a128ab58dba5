"""An index on disk, searched where it lies: against plain faiss and the lists in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from truth import clustered

from snipdedup import config
from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.index import search
from snipdedup.index.build import build
from snipdedup.index.folder import Index, export_faiss, load_shard
from snipdedup.index.search import MappedLists


def make(out: Path, rows: list[np.ndarray], **given: object) -> Index:
    given = {"nlist": 32, "m": 4, "threads": 1, **given}
    options = config.BuildIndex(features="x", out=str(out), **given)
    return build(open_features(rows), out, options)


@pytest.fixture(scope="module")
def parts() -> list[np.ndarray]:
    x = clustered(3000, 16, 1)
    return np.split(x, [700, 701, 701])  # of one row, and of none


@pytest.fixture(scope="module")
def index(parts, tmp_path_factory) -> Index:
    return make(tmp_path_factory.mktemp("mapped") / "x", parts)


def test_a_mapped_shard_is_the_shard(index):
    for shard in index.manifest["shards"]:
        path = index.folder / shard["file"]
        for one, other in zip(load_shard(path, mapped=True), load_shard(path), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_visited_lists_hold_what_all_lists_hold(index):
    all_lists, lists = index.lists(), MappedLists(index)
    for wanted in ([3], [31, 0, 7], list(range(32))):
        found = lists.visit(np.array(wanted))
        rows, of, codes = found
        order = np.lexsort((rows, of))
        places = np.flatnonzero(np.isin(all_lists.list_at(np.arange(3000)), wanted))
        np.testing.assert_array_equal(rows[order], all_lists.rows(places))
        np.testing.assert_array_equal(codes[order], all_lists.codes[places])


def test_of_very_many_shards_few_stay_mapped(index, parts, monkeypatch):
    whole = MappedLists(index)
    monkeypatch.setattr(search, "MOST_MAPPED", 1)
    some = MappedLists(index)
    assert len(some.mapped) == 1 < len(whole.mapped)
    x = parts[0][5] / np.linalg.norm(parts[0][5])
    for one, other in zip(
        whole.nearest(x, nprobe=4, k=9), some.nearest(x, nprobe=4, k=9), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(some.vector_of(2000), whole.vector_of(2000))


class Watched:
    """An array that notes which rows of it are looked at."""

    def __init__(self, array: np.ndarray, seen: set) -> None:
        self.array, self.seen = array, seen
        self.shape = array.shape

    def __getitem__(self, span: slice) -> np.ndarray:
        self.seen.update(range(*span.indices(len(self.array))))
        return self.array[span]


def test_only_the_visited_lists_are_read(index, parts):
    lists, seen = MappedLists(index), []
    for number, shard in list(lists.mapped.items()):
        seen.append(set())
        ids, codes = Watched(shard.ids, seen[-1]), Watched(shard.codes, seen[-1])
        lists.mapped[number] = shard._replace(ids=ids, codes=codes)
    x = parts[0][5] / np.linalg.norm(parts[0][5])
    lists.nearest(x, nprobe=2, k=5)
    probed = index.quantiser.assign(x[None].astype(np.float32), 2)[1][0]
    for shard, looked in zip(MappedLists(index).mapped.values(), seen, strict=True):
        of = np.repeat(np.arange(32), shard.sizes)
        assert looked == set(np.flatnonzero(np.isin(of, probed)).tolist())
    assert 0 < sum(map(len, seen)) < 600


def test_neighbours_are_those_of_plain_faiss_on_the_export(index, parts, tmp_path):
    export_faiss(index, tmp_path / "x.faiss")
    plain = faiss.read_index(str(tmp_path / "x.faiss"))
    plain.nprobe = 4
    x = np.concatenate(parts)[::50].astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    D0, I0 = plain.search(x, 20)
    lists = MappedLists(index)
    for number, vector in enumerate(x):
        D, I = lists.nearest(vector, nprobe=4, k=20)
        np.testing.assert_allclose(D, D0[number], atol=1e-5)
        clear = np.diff(D0[number], prepend=-1, append=9) > 1e-5  # of both its neighbours
        same = (clear[:-1] & clear[1:])[: len(I)]
        np.testing.assert_array_equal(I[same], I0[number][same])


def test_distances_do_not_depend_on_the_block(index, parts, monkeypatch):
    x = parts[3][9].astype(np.float32)
    D, I = MappedLists(index).nearest(x, nprobe=32, k=3000)
    assert sorted(I) == list(range(3000))
    monkeypatch.setattr(search, "DECODE_ROWS", 7)
    again = MappedLists(index).nearest(x, nprobe=32, k=3000)
    np.testing.assert_allclose(again[0], D, atol=1e-6)


def test_a_row_s_code_is_its_own(index, parts):
    lists, x = MappedLists(index), np.concatenate(parts)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    of = index.quantiser.assign(unit, 1)[1][:, 0]
    codes = index.quantiser.encode(unit, of)
    for row in (0, 699, 700, 701, 2999):
        expected = index.quantiser.decode(of[row : row + 1], codes[row : row + 1])[0]
        np.testing.assert_array_equal(lists.vector_of(row), expected)


def test_a_bad_row_has_no_code(parts, tmp_path):
    x = parts[0].copy()
    x[17] = np.nan
    index = make(tmp_path / "x", [x], bad_rows="keep")
    with pytest.raises(SnipError, match=r"row 17 is in no list of .*NaN, infinite or zero"):
        MappedLists(index).vector_of(17)


@pytest.mark.parametrize("harm", ["cut", "missing", "compressed", "other"])
def test_a_damaged_shard_is_refused_by_name(index, tmp_path, harm):
    shutil.copytree(index.folder, tmp_path / "x")
    path = tmp_path / "x" / "lists_00003.npz"
    shard = load_shard(path)._asdict()
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif harm == "missing":
        path.unlink()
    elif harm == "compressed":
        np.savez_compressed(path, **shard)
    else:
        np.savez(path, **{**shard, "ids": shard["ids"][1:]})
    with pytest.raises(SnipError, match=r"lists_00003\.npz: not a shard of an index, or damaged"):
        MappedLists(Index(tmp_path / "x"))
