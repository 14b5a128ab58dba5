"""The first read: exact copies, rows that cannot be compared, checksums."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.errors import InputError
from snipdedup.features import scan as room
from snipdedup.features.formats import open_shard
from snipdedup.features.hashing import row_hashes, shard_checksum
from snipdedup.features.scan import Seen, find_copies, scan
from snipdedup.features.shards import open_features
from snipdedup.storage import external_sort


def read(features, keep_bad=False, chunk_rows=65_536, threads=1):
    opened = open_features(features)
    return scan(opened, chunk_rows=chunk_rows, threads=threads, keep_bad=keep_bad)


def first_equal(x):
    """By bytes: {copy: first}."""
    seen, copies = {}, {}
    for row, values in enumerate(x):
        first = seen.setdefault(values.tobytes(), row)
        if first != row:
            copies[row] = first
    return copies


def listed(seen):
    return dict(zip(seen.copies.tolist(), seen.firsts.tolist(), strict=True))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 200),
    dim=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    hashing=st.sampled_from(["as shipped", "all alike", "three values"]),
)
def test_copies_are_found_and_nothing_else(rows, dim, seed, dtype, hashing):
    x = truth.clustered(rows, dim, seed, copies=0.5, dtype=dtype)
    hashes = {
        "as shipped": row_hashes,
        "all alike": lambda rows: np.zeros(len(rows), np.uint64),
        "three values": lambda rows: row_hashes(rows) % np.uint64(3),
    }[hashing]
    with mock.patch.object(room, "row_hashes", hashes):
        seen = read(x)
    assert listed(seen) == first_equal(x)
    assert seen.copies.tolist() == sorted(seen.copies.tolist())


@pytest.mark.parametrize("values", [0, 3])
def test_copies_are_the_same_whatever_memory_holds(tmp_path, values):
    x = truth.clustered(3000, 8, 2, copies=0.5, dtype=np.float16)
    x[7], x[70] = np.nan, np.nan
    hashes = row_hashes(x) if not values else row_hashes(x) % np.uint64(values)
    parts = [Seen([], np.empty(0, np.int64), part) for part in np.array_split(hashes, 7)]
    features, bad = open_features(x), np.array([7, 70])
    with (
        mock.patch.object(room, "SORT_ROWS", 200),
        mock.patch.multiple(external_sort, HELD=50, PARTS=3, READ=40),
    ):
        copies, firsts = find_copies(features, parts, bad=bad, folder=tmp_path / "w")
    expected = {copy: first for copy, first in first_equal(x).items() if copy not in bad}
    assert copies.tolist() == sorted(expected)
    assert dict(zip(copies.tolist(), firsts.tolist(), strict=True)) == expected
    assert find_copies(features, parts, bad=bad[:0])[0].tolist() == sorted(first_equal(x))


def test_copies_across_shards_of_different_types(tmp_path):
    x = truth.clustered(300, 8, 1, copies=0.4, dtype=np.float16)
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f" / "a_2.npy", x[:100])
    np.save(tmp_path / "f" / "a_10.npy", x[100:250].astype(np.float64))
    np.save(tmp_path / "f" / "a_11.npy", x[250:].astype(np.float32))
    assert listed(read(tmp_path / "f")) == first_equal(x)


@pytest.mark.parametrize("dim", [1, 3, 4, 8, 31, 512])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_hashes_see_every_bit_and_every_place(dim, dtype):
    x = np.random.default_rng(0).standard_normal((2000, dim)).astype(dtype)
    assert np.array_equal(row_hashes(x), row_hashes(x.copy()))
    different = len(np.unique(x.view(f"V{dim * x.itemsize}")))
    assert len(np.unique(row_hashes(x))) == different
    if dim > 1:
        turned = x[:, ::-1]
        moved = (turned != x).any(axis=1)
        assert not (row_hashes(turned) == row_hashes(x))[moved].any()
    bits = x.copy()
    bits.view(np.uint8)[:, -x.itemsize] ^= 1  # the last value's lowest bit
    assert not (row_hashes(bits) == row_hashes(x)).any()


def zeros_and_ones(rng):
    return (rng.random((100_000, 64)) < 0.5).astype(np.float64)


def halves_as_doubles(rng):
    return rng.standard_normal((100_000, 8)).astype(np.float16).astype(np.float64)


def whole_numbers(rng):
    return rng.integers(-9, 10, (100_000, 12)).astype(np.float64)


def powers_of_two(rng):
    return np.exp2(rng.integers(-20, 20, (100_000, 16))).astype(np.float32)


def float32_ones(rng):
    return zeros_and_ones(rng).astype(np.float32)


def float16_ones(rng):
    return zeros_and_ones(rng).astype(np.float16)


@pytest.mark.parametrize(
    "make",
    [zeros_and_ones, float32_ones, float16_ones, halves_as_doubles, whole_numbers, powers_of_two],
    ids=lambda f: f.__name__,
)
def test_rows_of_small_values_have_hashes_of_their_own(make):
    """Most bits of such words are zeros; each row is compared with its own first copy only."""
    rng = np.random.default_rng(0)
    x = np.unique(make(rng), axis=0)
    copies = rng.choice(len(x), 1000, replace=False)
    assert len(np.unique(row_hashes(x))) == len(x)
    both = np.concatenate([x, x[copies]])
    assert np.array_equal(row_hashes(both)[len(x) :], row_hashes(x)[copies])
    with mock.patch.object(room, "equal_pairs", wraps=room.equal_pairs) as compared:
        seen = read(both, keep_bad=True)
    assert sum(len(call.args[1]) for call in compared.call_args_list) == len(copies)
    assert seen.copies.tolist() == list(range(len(x), len(both)))


def test_rows_that_differ_in_the_sign_of_a_zero_are_no_copies():
    x = np.array([[1, 0.0], [1, -0.0], [1, 0.0], [1, -0.0]], np.float32)
    assert listed(read(x)) == {2: 0, 3: 1}


def test_one_row_and_rows_all_equal():
    assert listed(read(np.ones((1, 3)))) == {}
    assert listed(read(np.ones((30_000, 3)))) == dict.fromkeys(range(1, 30_000), 0)


def bad_set():
    x = truth.clustered(20_000, 6, 1, dtype=np.float32)
    x[7, 2], x[8200, 0], x[19_999, 5], x[12_345] = np.nan, np.inf, -np.inf, 0
    return x


def test_bad_rows_are_refused_with_number_file_and_row(tmp_path):
    folder = truth.save_shards(tmp_path / "f", bad_set(), [8000, 8000, 12_000])
    with pytest.raises(InputError) as error:
        read(folder)
    said = str(error.value)
    assert "4 of 20,000 rows cannot be compared" in said
    assert f"{folder / 'img_emb_0.npy'} row 7 (NaN)" in said
    assert f"{folder / 'img_emb_2.npy'} row 200 (infinity)" in said
    assert f"{folder / 'img_emb_3.npy'} row 345 (zeros only)" in said
    assert "--bad_rows keep" in said


def test_bad_rows_that_are_kept_are_listed_and_never_copies():
    x = bad_set()
    x[500], x[501], x[502] = x[12_345], x[7], x[600]
    seen = read(x, keep_bad=True)
    assert seen.bad.tolist() == [7, 500, 501, 8200, 12_345, 19_999]
    assert listed(seen) == {600: 502}
    assert np.flatnonzero(seen.skipped(len(x))).tolist() == sorted([*seen.bad, 600])


def test_values_that_only_look_bad_are_not():
    tiny, huge = np.finfo(np.float64).smallest_subnormal, np.finfo(np.float64).max
    seen = read(np.array([[tiny, 0], [huge, huge], [1e-200, 1e200], [0, -tiny]]))
    assert len(seen.bad) == 0
    half = np.array([[65504, 65504], [6e-8, 0]], np.float16)
    assert len(read(half).bad) == 0


def test_chunks_threads_and_shards_change_nothing(tmp_path):
    x = bad_set()
    x[100:3000] = x[10_100:13_000]
    whole = read(x, keep_bad=True)
    cut = truth.save_shards(tmp_path / "f", x, [1, 5000, 5000, 16_000])
    for source, chunk, threads in [(x, 1, 2), (x, 8193, 1), (cut, 1, 2), (cut, 10**6, 1)]:
        seen = read(source, keep_bad=True, chunk_rows=chunk, threads=threads)
        for one, other in zip(seen[:3], whole[:3], strict=True):
            assert np.array_equal(one, other)


def plain_checksum(rows):
    """By the definition, with Python's integers."""
    words = rows.view(np.uint64).tolist()
    offsets = np.random.default_rng(0x5E1F).integers(0, 2**64, rows.nbytes // len(rows) // 8,
                                                     np.uint64).tolist()  # fmt: skip
    odd, total = 0x9E3779B97F4A7C15, 0
    for place, row in enumerate(words):
        pairs = [(row[n] + offsets[n]) * (row[n + 1] + offsets[n + 1]) for n in range(0, 4, 2)]
        word = (sum((a % 2**64) for a in pairs) + place * odd) % 2**64
        word = (word ^ word >> 32) * odd % 2**64
        total += word ^ word >> 32
    return total % 2**64


def test_a_checksum_is_that_of_a_shard_however_it_is_read(tmp_path):
    x = truth.clustered(20_000, 16, 1, dtype=np.float16)
    cuts = [1, 9000, 9000]
    folder = truth.save_shards(tmp_path / "f", x, cuts)
    np.save(folder / "img_emb_4.npy", x[:3].astype(np.float64))  # all are read as float64 then
    expected = [plain_checksum(part) if len(part) else 0 for part in np.split(x, cuts)]
    for chunk, threads in ((1, 2), (10**6, 1)):
        assert read(folder, chunk_rows=chunk, threads=threads).checksums[:4] == expected
    for number in range(4):
        assert shard_checksum(open_shard(folder / f"img_emb_{number}.npy")) == expected[number]


@pytest.mark.parametrize("change", ["bit", "order", "end"])
def test_a_checksum_tells_a_changed_shard(change):
    x = truth.clustered(500, 16, 1, dtype=np.float16)
    other = x.copy()
    if change == "bit":
        other.view(np.uint8)[250, 0] ^= 1
    elif change == "order":
        other[[10, 490]] = x[[490, 10]]
    else:
        other = x[:-1]
    assert read(x).checksums != read(other).checksums
