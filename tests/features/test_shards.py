"""Which files are the input, in which order, and that every row comes once, whatever the pieces."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.hashing import shard_checksum, sum_checksums
from snipdedup.features.shards import (
    Features,
    find_shards,
    implied_metadata,
    natural_sort,
    open_features,
    part_numbers,
    plan_blocks,
    plan_pieces,
)

sizes_of_shards = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        np.save(folder / name, np.ones((1, 2), np.float32))
        if not name.endswith(".npy"):
            (folder / f"{name}.npy").rename(folder / name)
    return folder


def names(paths) -> list[str]:
    return [path.name for path in paths]


# ---- plans


@given(rows=st.integers(0, 200), size=st.integers(1, 50))
def test_blocks_cover_each_row_once_and_are_aligned(rows, size):
    blocks = plan_blocks(rows, size)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(start % size == 0 and 0 < stop - start <= size for start, stop in blocks)


@given(sizes=sizes_of_shards, data=st.data())
def test_pieces_cover_each_row_once_in_order(sizes, data):
    offsets = offsets_of(sizes)
    rows = int(offsets[-1])
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    covered, places, shards = [], [], []
    for shard, rows, place in plan_pieces(offsets, start, stop):
        assert 0 <= rows.start < rows.stop <= sizes[shard]
        covered += range(offsets[shard] + rows.start, offsets[shard] + rows.stop)
        places += range(place.start, place.stop)
        shards.append(shard)
    assert covered == list(range(start, stop))
    assert places == list(range(stop - start))
    assert shards == sorted(set(shards))


def test_pieces_by_hand():
    offsets = offsets_of([3, 0, 0, 2, 4])
    pieces = [
        (0, slice(2, 3), slice(0, 1)),
        (3, slice(0, 2), slice(1, 3)),
        (4, slice(0, 1), slice(3, 4)),
    ]
    assert list(plan_pieces(offsets, 2, 6)) == pieces
    assert list(plan_pieces(offsets, 3, 5)) == [(3, slice(0, 2), slice(0, 2))]
    assert not list(plan_pieces(offsets, 4, 4))
    assert not list(plan_pieces(offsets, 9, 9))


# ---- reading


def write_mixed(folder: Path, sizes: list[int], dim: int = 4) -> np.ndarray:
    """Write shards of changing formats and types; return all rows in float64."""
    folder.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(len(sizes))
    rows = []
    for number, size in enumerate(sizes):
        dtype = (np.float16, np.float32, np.float64)[number % 3]
        block = rng.standard_normal((size, dim)).astype(dtype)
        np.save(folder / f"img_emb_{number}.npy", block)
        rows.append(block.astype(np.float64))
    return np.concatenate(rows)


@given(sizes=sizes_of_shards.filter(any), data=st.data())
@settings(deadline=None, max_examples=60)
def test_read_and_gather_are_numpy_indexing(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("features")
    rows = write_mixed(folder, sizes)
    features = open_features(folder)
    assert (features.rows, features.dim) == rows.shape
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert np.array_equal(features.read(start, stop), rows[start:stop])
    asked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    found = features.gather(np.array(asked, np.int64))
    assert found.dtype == features.dtype
    assert np.array_equal(found, rows[np.array(asked, np.int64)])
    for row in range(len(rows)):
        path, at = features.place(row)
        assert np.array_equal(np.load(path)[at], rows[row].astype(np.load(path).dtype))
    shutil.rmtree(folder)


def test_formats_side_by_side_in_one_sequence(tmp_path):
    a = np.arange(6, dtype=np.float16).reshape(3, 2)
    np.save(tmp_path / "a.npy", a)
    np.savez_compressed(tmp_path / "b.npz", x=a.astype(np.float32) + 10)
    flat = pa.array(np.arange(20.0, 26.0))
    column = pa.FixedSizeListArray.from_arrays(flat, 2)
    pq.write_table(pa.table({"emb": column}), tmp_path / "c.parquet")
    features = open_features([tmp_path / n for n in ("a.npy", "b.npz", "c.parquet")])
    assert features.dtype == np.float64
    expected = np.concatenate([a, a + 10, a + 20])
    assert np.array_equal(features.read(0, 9), expected)
    assert np.array_equal(features.gather(np.array([8, 0, 4, 4])), expected[[8, 0, 4, 4]])


def test_arrays_in_memory():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((2, 3)).astype(np.float32)
    features = open_features([np.asfortranarray(x), y])
    assert features.paths() == []
    assert np.array_equal(features.read(3, 7), np.concatenate([x[3:], y]))
    assert [shard["rows"] for shard in features.describe()] == [5, 2]
    features.read(0, 5)[:] = 0
    assert np.array_equal(features.read(0, 5), x)
    with pytest.raises(SnipError, match=r"array: expected float16, float32 or float64.*int64"):
        open_features(np.ones((2, 2), np.int64))


def test_blocks_are_aligned(tmp_path):
    rows = write_mixed(tmp_path, [3, 0, 5, 2])
    seen = list(open_features(tmp_path).blocks(4))
    assert [start for start, _ in seen] == [0, 4, 8]
    assert np.array_equal(np.concatenate([block for _, block in seen]), rows)


@given(sizes=sizes_of_shards.filter(any), size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_checksums_of_parts_add_up(tmp_path_factory, sizes, size, seed):
    folder = tmp_path_factory.mktemp("features")
    write_mixed(folder, sizes)
    features = open_features(folder)
    blocks = plan_blocks(features.rows, size)
    order = np.random.default_rng(seed).permutation(len(blocks))  # threads finish in any order
    parts = [features.checksums(blocks[n][0], features.read(*blocks[n])) for n in order]
    expected = [shard_checksum(shard) for shard in features.shards]
    assert sum_checksums(parts, len(sizes)) == expected
    shutil.rmtree(folder)


def test_shards_are_described_for_the_manifest(tmp_path):
    write_mixed(tmp_path, [3, 2])
    described = open_features(tmp_path).describe()
    assert [(d["name"], d["rows"], d["dtype"]) for d in described] == [
        ("img_emb_0.npy", 3, "float16"),
        ("img_emb_1.npy", 2, "float32"),
    ]
    assert [d["size"] for d in described] == [p.stat().st_size for p in sorted(tmp_path.iterdir())]


def test_a_shard_without_rows_between_others(tmp_path):
    rows = write_mixed(tmp_path, [0, 2, 0, 3, 0])
    features = open_features(tmp_path)
    assert np.array_equal(features.read(0, 5), rows)
    assert features.place(2) == (tmp_path / "img_emb_3.npy", 0)
    np.save(tmp_path / "img_emb_9.npy", np.empty((0, 0), np.float32))  # no rows, no width known
    assert open_features(tmp_path).rows == 5


def test_no_rows_in_all(tmp_path):
    write_mixed(tmp_path, [0, 0])
    with pytest.raises(SnipError, match=r"no rows at all in .*img_emb_0.npy, .*img_emb_1.npy"):
        open_features(tmp_path)


def test_widths_that_differ(tmp_path):
    np.save(tmp_path / "img_emb_0.npy", np.ones((2, 4), np.float32))
    np.save(tmp_path / "img_emb_1.npy", np.ones((2, 5), np.float32))
    found = r"img_emb_1.npy: rows are 5 wide, those of .*img_emb_0.npy are 4"
    with pytest.raises(SnipError, match=found):
        open_features(tmp_path)
    np.save(tmp_path / "img_emb_1.npy", np.ones((0, 5), np.float32))
    with pytest.raises(SnipError, match=r"img_emb_1.npy: rows are 5 wide"):
        open_features(tmp_path)


# ---- which files


def test_natural_order():
    wanted = ["img_emb_0.npy", "img_emb_2.npy", "img_emb_10.npy", "img_emb_0011.npy", "x.npy"]
    paths = [Path(name) for name in wanted]
    assert natural_sort(reversed(paths)) == paths
    assert natural_sort(paths) == paths


@given(st.lists(st.integers(0, 10**6), unique=True), st.integers(0, 8))
def test_numbers_sort_as_numbers_whatever_the_padding(numbers, padding):
    paths = [Path(f"part-{n:0{padding}d}-emb.npy") for n in numbers]
    in_order = [int(p.name.split("-")[1]) for p in natural_sort(paths)]
    assert in_order == sorted(numbers)


@given(st.lists(st.text("a1_0-9.B", min_size=1, max_size=6), unique=True), st.randoms())
def test_natural_order_does_not_depend_on_the_order_found(texts, random):
    paths = [Path("d") / text for text in texts if text.strip(".")]
    shuffled = random.sample(paths, len(paths))
    assert natural_sort(paths) == natural_sort(shuffled)


def test_a_folder_is_not_searched_recursively_and_stray_files_are_ignored(tmp_path):
    touch(tmp_path, "img_emb_10.npy", "img_emb_9.npy", ".img_emb_0.npy", "notes.txt", "knn.index")
    touch(tmp_path / "deeper", "img_emb_0.npy")
    (tmp_path / "folder.npy").mkdir()
    assert names(find_shards(tmp_path)) == ["img_emb_9.npy", "img_emb_10.npy"]
    assert names(find_shards(f"{tmp_path}/")) == ["img_emb_9.npy", "img_emb_10.npy"]


def test_npy_wins_over_parquet_beside_it(tmp_path):
    touch(tmp_path, "a.parquet", "a.npz")
    assert names(find_shards(tmp_path)) == ["a.npz"]
    touch(tmp_path, "a.NPY")
    assert names(find_shards(tmp_path)) == ["a.NPY"]


def test_img_emb_inside_a_clip_retrieval_folder(tmp_path):
    touch(tmp_path / "img_emb", "img_emb_0.npy")
    touch(tmp_path / "text_emb", "text_emb_0.npy")
    touch(tmp_path, "image.index")
    assert find_shards(tmp_path) == [tmp_path / "img_emb" / "img_emb_0.npy"]
    assert implied_metadata(tmp_path) is None
    (tmp_path / "metadata").mkdir()
    assert implied_metadata(tmp_path) == tmp_path / "metadata"
    assert implied_metadata(tmp_path / "img_emb") is None
    touch(tmp_path, "own.npy")
    assert find_shards(tmp_path) == [tmp_path / "own.npy"]
    assert implied_metadata(tmp_path) is None


def test_a_file_and_a_glob(tmp_path):
    touch(tmp_path, "a[1].npy", "b_2.npy", "b_10.npy", "b_x.txt")
    assert names(find_shards(tmp_path / "a[1].npy")) == ["a[1].npy"]
    assert names(find_shards(tmp_path / "b_*.npy")) == ["b_2.npy", "b_10.npy"]
    assert names(find_shards(tmp_path / "b_[0-9].npy")) == ["b_2.npy"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "f", "0.npy")
    for spec in ("~/f", "~/f/*.npy", "~/f/0.npy"):
        assert find_shards(spec) == [tmp_path / "f" / "0.npy"]
    assert find_shards("~/f/{part}.npy", "0:1") == [tmp_path / "f" / "0.npy"]


def test_part_patterns(tmp_path):
    touch(tmp_path, *(f"img_emb_{part:04d}.npy" for part in range(12)))
    pattern = f"{tmp_path}/img_emb_{{part:04d}}.npy"
    assert names(find_shards(pattern, "9:11")) == ["img_emb_0009.npy", "img_emb_0010.npy"]
    with pytest.raises(SnipError, match=r"no shard found: .*img_emb_0012.npy \(2 of 4 are missing"):
        find_shards(pattern, "10:14")


@pytest.mark.parametrize("parts", [None, "", "3", "2:2", "3:1", "-1:2", "a:b", "0:2:4", "0:2 "])
def test_parts_that_are_no_range(parts):
    with pytest.raises(UsageError, match="needs --parts START:END, end exclusive, found"):
        find_shards("img_{part:04d}.npy", parts)


@pytest.mark.parametrize("pattern", ["x_{part:04x!}.npy", "{part}{other}.npy", "{part.x}", "{part"])
def test_patterns_that_are_none(pattern):
    with pytest.raises(UsageError, match=r"expected a pattern such as img_emb_\{part:04d\}.npy"):
        find_shards(pattern, "0:2")


def test_parts_need_a_pattern(tmp_path):
    with pytest.raises(UsageError, match="--parts needs a pattern"):
        find_shards(touch(tmp_path, "a.npy"), "0:1")
    assert part_numbers("{part}", "0:12") == (0, 12)


def test_no_shard_found(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SnipError, match=rf"no shard found in {tmp_path}: expected \*.npy, \*.npz"):
        find_shards(tmp_path)
    with pytest.raises(SnipError, match=r"no shard found: nothing matches .*\*\.npy"):
        find_shards(tmp_path / "*.npy")
    with pytest.raises(SnipError, match=r"no such file or folder: .*gone"):
        find_shards(tmp_path / "gone")


MIXTURES = [
    ("image_embeddings.npy", "text_embeddings.npy", "image_embeddings*"),
    ("img_emb_0.npy", "text_emb_0.npy", "img_emb_*"),
    ("IMAGES_1.npy", "captions_1.npy", "IMAGES_*"),
]


@pytest.mark.parametrize(("image", "text", "hint"), MIXTURES)
def test_image_and_text_features_side_by_side(tmp_path, image, text, hint):
    touch(tmp_path, image, text)
    for spec in (tmp_path, tmp_path / "*.npy"):
        with pytest.raises(SnipError, match="mixes image and text features") as caught:
            find_shards(spec)
        assert image in str(caught.value)
        assert text in str(caught.value)
        assert str(tmp_path / hint) in str(caught.value)
    assert names(find_shards(tmp_path / hint)) == [image]


def test_the_same_word_in_all_names_is_no_mixture(tmp_path):
    touch(tmp_path, "text_image_0.npy", "text_image_1.npy", "context.npy")
    assert len(find_shards(tmp_path)) == 3


# ---- real files


def test_real_folders(data):
    small = data / "small"
    assert open_features(data / "keyframes").rows == 58_977
    assert names(find_shards(small / "clip_retrieval_out")) == ["img_emb_0.npy"]
    assert implied_metadata(small / "clip_retrieval_out").name == "metadata"
    with pytest.raises(SnipError, match="mixes image and text features"):
        find_shards(small / "shopsphere")
    patents = Features([*open_features(small / "design_patents" / "image_embeddings.npy").shards])
    assert (patents.rows, patents.dim, patents.dtype) == (1000, 512, np.float64)


def test_a_tensor_is_read_as_the_array_it_views():
    rows = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    both = [torch.from_numpy(rows), torch.from_numpy(rows.copy()).requires_grad_()]
    for tensor in (*both, both, both[0].half(), torch.from_numpy(rows.T.copy()).T):
        found = open_features(tensor).read(0, 60 if tensor is both else 30)
        like = [rows, rows] if tensor is both else [rows]
        assert np.array_equal(found, np.concatenate(like).astype(found.dtype))
    assert np.shares_memory(open_features(both[0]).shards[0].array, rows)
    assert dedup(both[0]).is_dup.tolist() == dedup(rows).is_dup.tolist()


ROWS = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ROWS.tolist(), "found list in list; .* give numpy.array"),
        ((1.0, 2.0), "found float in tuple"),
        ({"img": ROWS}, "found dict"),
        (b"img_emb", "found bytes"),
        (7, "found int"),
        ([ROWS, 7], "found int in list"),
        (torch.ones(3, 4, device="meta"), "found torch.Tensor that numpy cannot take"),
        (np.ma.masked_array(ROWS, ROWS > 0), "found a masked array"),
    ],
)
def test_what_is_neither_array_nor_path_is_wrong_usage(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        open_features(given)
    assert isinstance(caught.value, TypeError) == ("masked" not in message)
    with pytest.raises(UsageError, match=message):
        dedup(given)


@pytest.mark.parametrize("given", [torch.ones(4), torch.ones(3, 4, dtype=torch.int64)])
def test_a_tensor_that_holds_no_features_is_refused(given):
    with pytest.raises(SnipError, match="array: expected"):
        open_features(given)
