"""Keep rules by column: the copy that stays is the one that plain Python would choose."""

from __future__ import annotations

import datetime as dt
import itertools
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snipdedup.config import Dedup
from snipdedup.deduplication.run import dedup, run
from snipdedup.errors import SnipError, UsageError
from snipdedup.groups import keep
from snipdedup.metadata.tables import open_metadata


def write(folder, table, cuts=(3,)):
    """Write a table over several files."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [0, *cuts, len(table)]
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        pq.write_table(table.slice(start, stop - start), folder / f"m_{number}.parquet")
    return open_metadata(folder)


def order_of(rule, metadata, rows, seed=0):
    """The rows in keep order."""
    rows = np.asarray(rows)
    return rows[np.argsort(keep.rank_by(rule, seed, metadata)(rows))].tolist()


SIGNS = st.sampled_from([-1, 1])
NUMBERS = st.one_of(
    st.none(), st.floats(width=64), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan])
)


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.booleans())
def test_any_floats_are_ordered_as_python_orders_them(values, descending):
    rank, rest = keep.order_keys(pa.array(values, pa.float64()), descending=descending)
    assert len({*rest.tolist()}) <= 2  # of values, and of missing ones
    missing = [v is None or math.isnan(v) for v in values]
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if missing[i] or missing[j]:
                assert (rank[i] < rank[j]) == (missing[j] and not missing[i])
            elif max(abs(a), abs(b)) < math.inf:  # the ends of the range may tie
                assert (rank[i] < rank[j]) == (a > b if descending else a < b)


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 2), min_size=1, max_size=30), st.booleans())
def test_whole_numbers_are_exact(values, descending):
    rank, rest = keep.order_keys(pa.array(values, pa.int64()), descending=descending)
    found = [values[i] for i in np.lexsort((rest, rank))]
    assert found == sorted(values, reverse=descending)


def test_rules_in_their_order_and_nulls_last(tmp_path):
    table = pa.table(
        {
            "Similarity": [0.3, 0.3, None, 0.3, float("nan"), 0.2, 0.3],
            "WIDTH": [10, 30, 99, 30, 99, 99, None],
        }
    )
    meta = write(tmp_path, table)
    rows = [6, 5, 4, 3, 2, 1, 0]
    assert order_of("max:similarity,max:width,first", meta, rows) == [1, 3, 0, 6, 5, 2, 4]
    assert order_of("max:similarity,max:width,last", meta, rows) == [3, 1, 0, 6, 5, 4, 2]
    assert order_of("min:similarity,min:width", meta, rows) == [5, 0, 1, 3, 6, 2, 4]
    assert order_of("max:width", meta, [0, 6, 1]) == [1, 0, 6]


def test_random_decides_among_even_rows_by_the_seed(tmp_path):
    meta = write(tmp_path, pa.table({"w": [1] * 50 + [2]}))
    one, two = (order_of("max:w,random", meta, range(51), seed) for seed in (1, 2))
    assert one[0] == two[0] == 50
    assert one != two
    assert sorted(one) == list(range(51))
    assert one == order_of("max:w,random", meta, range(51), 1)


def test_some_rows_are_ordered_as_among_all(tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"a": rng.integers(0, 5, 200), "b": rng.random(200).astype(np.float32)})
    meta = write(tmp_path, table, (50, 50, 130))
    whole = order_of("max:a,min:b", meta, range(200))
    some = rng.permutation(200)[:40]
    assert order_of("max:a,min:b", meta, some) == [row for row in whole if row in some]


def casts_halves():
    """Tell whether this pyarrow can cast float16; early ones cannot."""
    try:
        pa.array(np.zeros(1, np.float16)).cast(pa.float64())
    except pa.ArrowNotImplementedError:
        return False
    return True


@pytest.mark.parametrize(
    "values",
    [
        [dt.date(2024, 1, 1), dt.date(2023, 1, 1), None, dt.date(2024, 6, 1)],
        [dt.datetime(2024, 1, 1), dt.datetime(2023, 1, 1), None, dt.datetime(2024, 6, 1)],
        [True, False, None, True],
        pa.array([2**64 - 3, 5, None, 2**64 - 2], pa.uint64()),
        pa.array(["1.5", "-2", None, "10"]).cast(pa.decimal128(9, 2)),
        pytest.param(
            pa.array(np.array([1.5, -2, 0, 10], np.float16), mask=np.arange(4) == 2),
            marks=pytest.mark.skipif(not casts_halves(), reason="pyarrow cannot cast float16"),
        ),
    ],
)
def test_columns_of_every_kind_that_has_an_order(tmp_path, values):
    meta = write(tmp_path, pa.table({"v": values}), (2,))
    assert order_of("max:v", meta, [0, 1, 2, 3])[-1] == 2
    assert order_of("min:v", meta, [0, 1, 2, 3])[0] == 1
    assert order_of("max:v,last", meta, [0, 1, 2, 3])[0] == 3


def test_files_whose_types_differ_are_compared_as_numbers(tmp_path):
    pq.write_table(pa.table({"v": [3, 1]}), tmp_path / "m_0.parquet")
    pq.write_table(pa.table({"v": [2.5, None]}), tmp_path / "m_1.parquet")
    pq.write_table(pa.table({"v": pa.nulls(1)}), tmp_path / "m_2.parquet")
    assert order_of("max:v", open_metadata(tmp_path), range(5)) == [0, 2, 1, 3, 4]
    pq.write_table(pa.table({"v": ["x"]}), tmp_path / "m_2.parquet")
    with pytest.raises(SnipError, match="column 'v' is int64 and double and string, expected num"):
        order_of("max:v", open_metadata(tmp_path), range(5))


EDGES = st.sampled_from([0, 2**53, 2**53 + 1, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64])
NEAR = st.builds(lambda edge, by, sign: sign * edge + by, EDGES, st.integers(-3, 3), SIGNS)
HELD_BY = {
    "int64": NEAR.filter(lambda n: -(2**63) <= n < 2**63),
    "uint64": NEAR.filter(lambda n: 0 <= n < 2**64),
    "float64": st.one_of(NEAR.map(float), st.floats(allow_nan=False, allow_infinity=False)),
}


@given(st.data(), st.sampled_from(["min", "max"]), st.booleans())
def test_numbers_of_all_types_are_compared_exactly(tmp_path_factory, data, way, all_three):
    folder = tmp_path_factory.mktemp("mixed")
    kinds = sorted(HELD_BY) if all_three else data.draw(st.permutations(sorted(HELD_BY)))[:2]
    values = []
    for number, kind in enumerate(kinds):
        column = data.draw(st.lists(st.none() | HELD_BY[kind], min_size=1, max_size=8))
        column = pa.array(column, getattr(pa, kind)())
        pq.write_table(pa.table({"v": column}), folder / f"m_{number}.parquet")
        values += column.to_pylist()  # Python compares whole numbers and floats exactly
    sign = 1 if way == "min" else -1
    rows = range(len(values))
    expected = sorted(rows, key=lambda r: (values[r] is None, sign * Fraction(values[r] or 0), r))
    metadata = open_metadata(folder)
    assert order_of(f"{way}:v", metadata, rows) == expected
    rank = keep.rank_by(f"{way}:v", 0, metadata)
    rank.read_all(folder)
    assert np.argsort(rank(np.arange(len(values)))).tolist() == expected


def test_numbers_of_a_csv_are_texts_that_are_read_as_numbers(tmp_path):
    (tmp_path / "m_0.csv").write_text("w,k\n10,a\n9.5,b\n,c\n")
    (tmp_path / "m_1.csv").write_text("w,k\n1e3,d\n-7,e\n")
    assert order_of("max:w", open_metadata(tmp_path), range(5)) == [3, 0, 1, 4, 2]
    with pytest.raises(SnipError, match=r"m_0\.csv row 1: column 'k' is 'b', expected a number"):
        order_of("max:k", open_metadata(tmp_path), [1, 3])


TIMES = [
    "2021-03-01T10:00:00", "", "2021-03-01T10:00:00+02:00", "2020-12-31", "2021-03-01T09:30:00Z",
    "2021-03-01 08:30:00.25", None, "2021-03-01T03:00:00-05:30",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_times_as_texts_are_ordered_and_nulls_last(tmp_path, suffix):
    """Python's own parser tells the order; what has no offset from UTC is of UTC."""
    table = pa.table({"width": [1] * 7 + [2], "exif_time": TIMES})
    if suffix == "csv":
        pa.csv.write_csv(table, tmp_path / "m.csv")
        meta = open_metadata(tmp_path / "m.csv")
    else:
        meta = write(tmp_path, table, (3,))

    def instant(row):
        found = dt.datetime.fromisoformat(TIMES[row].replace("Z", "+00:00").replace(".25", ".250"))
        return found if found.tzinfo else found.replace(tzinfo=dt.UTC)

    known = [row for row in range(8) if TIMES[row]]
    early = sorted(known, key=instant)
    assert order_of("min:exif_time", meta, range(8)) == [*early, 1, 6]
    assert order_of("max:exif_time,last", meta, range(8)) == [*early[::-1], 6, 1]
    best = [row for row in early if row != 7]
    assert order_of("max:width,min:exif_time", meta, [7, 0, 1, 2, 3, 4, 5]) == [7, *best, 1]
    rank = keep.rank_by("min:exif_time", 0, meta)
    rank.read_all(tmp_path / "held")
    assert np.argsort(rank(np.arange(8))).tolist() == [*early, 1, 6]


@pytest.mark.parametrize(
    ("texts", "suffix", "what"),
    [
        (["2021-01-01", "a cat"], "parquet", "row 1: column 'v' is 'a cat', expected a time such"),
        (["12", "13"], "parquet", "row 0: column 'v' is '12', expected a time such as"),
        (["12", "2021-01-01"], "csv", "row 1: column 'v' is '2021-01-01', expected a number to"),
        (["2021-01-01", "12"], "csv", "row 1: column 'v' is '12', expected a time such as"),
        (["2021-13-01", "x"], "csv", "row 0: column 'v' is '2021-13-01', expected a number to"),
    ],
)
def test_texts_of_two_kinds_are_refused_by_the_row(tmp_path, texts, suffix, what):
    table = pa.table({"v": texts})
    path = tmp_path / f"m.{suffix}"
    (pa.csv.write_csv if suffix == "csv" else pq.write_table)(table, path)
    with pytest.raises(SnipError, match=what):
        order_of("max:v", open_metadata(path), [0, 1])


def test_minus_1_is_less_than_any_uint64(tmp_path):
    pq.write_table(pa.table({"q": pa.array([-1, 5], pa.int64())}), tmp_path / "m_0.parquet")
    pq.write_table(pa.table({"q": pa.array([7, 2**64 - 9], pa.uint64())}), tmp_path / "m_1.parquet")
    assert order_of("max:q", open_metadata(tmp_path), range(4)) == [3, 2, 1, 0]
    assert order_of("min:q", open_metadata(tmp_path), range(4)) == [0, 1, 2, 3]


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    meta = write(tmp_path, pa.table({"v": [1, 2, 3, 4], "text": ["x"] * 4, "w": [1] * 4}), (2,))
    read = []
    plain = pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        read.append(options["columns"])
        return plain(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    order_of("max:V,min:v", meta, [0, 1])
    assert read == [["v"]]


@pytest.mark.parametrize(
    "rule", ["", "best", "max:", "max", "first,max:w", "random,first", "max:w,,first", "mean:w"]
)
def test_what_is_no_rule_is_wrong_usage(rule):
    with pytest.raises(UsageError, match="--keep must be first, last or random, or rules such as"):
        Dedup(features="f", keep=rule)


@pytest.fixture
def copies(tmp_path):
    """Ten rows, each three times; metadata in two files."""
    rng = np.random.default_rng(1)
    rows = np.tile(rng.standard_normal((10, 32)).astype(np.float32), (3, 1))
    np.save(tmp_path / "f.npy", rows + 1e-3 * rng.standard_normal(rows.shape).astype(np.float32))
    table = pa.table({"Width": rng.integers(1, 4, 30), "score": rng.random(30)})
    write(tmp_path / "meta", table, (12,))
    return tmp_path, table["Width"].to_numpy(), table["score"].to_numpy()


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_the_copy_that_stays_is_the_best_by_the_rules(copies, grouping):
    folder, width, score = copies
    settings = {"metadata": str(folder / "meta"), "grouping": grouping}
    rule = "max:width,min:score"
    result = dedup(str(folder / "f.npy"), keep=rule, **settings)
    best = [min(range(n, 30, 10), key=lambda row: (-width[row], score[row])) for n in range(10)]
    assert np.flatnonzero(~result.is_dup).tolist() == sorted(best)
    assert result.at(0.96).is_dup.tolist() == result.is_dup.tolist()
    out = folder / "out"
    written = dedup(str(folder / "f.npy"), keep=rule, out=str(out), **settings)
    assert written.is_dup.tolist() == result.is_dup.tolist()
    again = dedup(str(folder / "f.npy"), keep=rule, out=str(out), **settings)  # read back
    assert again.is_dup.tolist() == result.is_dup.tolist()
    run(Dedup(features=str(out), threshold=0.96, out=str(folder / "stricter")))
    assert np.load(folder / "stricter" / "is_dup.npy").tolist() == result.is_dup.tolist()


def test_refusals_come_before_the_search(copies, snip):
    folder, *_ = copies
    words = ("dedup", folder / "f.npy", "--out", folder / "out", "--keep")
    said = snip(*words, "max:height", "--metadata", folder / "meta", status=1).stderr
    assert "column 'height' is not there; its columns: Width, score" in said
    said = snip(*words, "max:width", status=2).stderr
    assert "--keep max:width names columns of the metadata: give --metadata too" in said
    assert not (folder / "out").exists()


def test_real_keyframes_keep_the_latest_frame(data, tmp_path):
    frames = data / "keyframes"
    features = np.load(frames / "img_emb" / "img_emb_0000.npy")
    meta = frames / "metadata" / "metadata_0000.parquet"
    frame = pq.read_table(meta)["frame"].to_numpy()
    result = dedup(features, metadata=str(meta), keep="max:frame,last", grouping="components")
    row, group, gone = (result.groups[n].to_numpy() for n in ("row", "group", "is_dup"))
    assert result.removed > 100
    for label in np.unique(group):
        members = row[group == label]
        best = max(members, key=lambda r: (frame[r], r))
        assert members[~gone[group == label]].tolist() == [best]
