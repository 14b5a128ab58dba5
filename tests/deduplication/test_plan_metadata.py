"""What the end cannot do with metadata is refused before any row of features is read."""

from __future__ import annotations

import decimal
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.deduplication import run

ROWS = 12  # of two files; those of the second are copies of the first's
HALF = ROWS // 2


def column(kind, value, other):
    return pa.array([value, other, None] * (HALF // 3), kind)


if not hasattr(pa, "string_view"):
    pytest.skip("pyarrow before 16 has no views", allow_module_level=True)

COLUMNS = {
    "string": column(pa.string(), "a", "b"),
    "large_string": column(pa.large_string(), "a", "b"),
    "string_view": column(pa.string_view(), "a", "b"),
    "dictionary": column(pa.string(), "a", "b").dictionary_encode(),
    "int64": column(pa.int64(), -1, 2),
    "uint64": column(pa.uint64(), 2**64 - 1, 2),
    "double": column(pa.float64(), 0.5, float("nan")),
    "halffloat": column(pa.float16(), 0.5, 2.0),
    "decimal": column(pa.decimal128(5, 2), decimal.Decimal("1.5"), decimal.Decimal("2.5")),
    "bool": column(pa.bool_(), True, False),
    "null": pa.nulls(HALF),
    "date32": column(pa.date32(), 1, 2),
    "timestamp": column(pa.timestamp("ms", "UTC"), 1, 2),
    "time32": column(pa.time32("s"), 1, 2),
    "time64": column(pa.time64("us"), 1, 2),
    "duration": column(pa.duration("s"), 1, 2),
    "ascii": column(pa.binary(), b"a", b"b"),
    "binary": column(pa.binary(), b"\xff\xfe", b"b"),
    "fixed_size_binary": column(pa.binary(2), b"\xff\xfe", b"bb"),
    "binary_view": column(pa.binary_view(), b"\xff", b"b"),
    "list": column(pa.list_(pa.string()), ["a"], []),
    "list of string_view": column(pa.list_(pa.string_view()), ["a"], []),
    "struct": column(pa.struct({"a": pa.int8()}), {"a": 1}, {"a": 2}),
    "map": column(pa.map_(pa.string(), pa.int8()), [("a", 1)], []),
}
USES = {
    "key": ("c", "--key", "c"),
    "automatic key": ("hash",),
    "keep": ("c", "--keep", "max:c"),
    "captions": ("c", "--merge_captions", 2, "--caption", "c"),
    "list": ("c", "--export", "keys", "--key", "c"),
    "uids": ("uid", "--export", "datacomp"),
    "url": ("url",),
    "nothing": ("c",),
}
# Types that each use takes: what else there is must be refused.
TEXTS = {
    "string", "large_string", "string_view", "dictionary", "int64", "uint64", "double",
    "halffloat", "decimal", "bool", "null", "date32", "timestamp", "time32", "time64", "duration",
    "ascii",
}  # fmt: skip
ORDERED = {
    "int64", "uint64", "double", "halffloat", "decimal", "bool", "null", "date32", "timestamp",
}  # fmt: skip
BYTES = {"binary", "fixed_size_binary", "binary_view"}
TAKEN = {
    "key": TEXTS, "automatic key": TEXTS, "captions": TEXTS, "keep": ORDERED,
    "url": TEXTS | BYTES, "nothing": set(COLUMNS),
}  # fmt: skip
FEW = {"automatic key", "list", "uids", "nothing"}  # tried with some types only


def write_set(folder, name, values):
    """Two shards, the second a copy of the first, and two files of metadata."""
    x = np.random.default_rng(0).standard_normal((HALF, 8)).astype(np.float32)
    for place in ("img_emb", "metadata"):
        (folder / place).mkdir(parents=True)
    for number in range(2):
        np.save(folder / "img_emb" / f"{number}.npy", x)
        table = pa.table({"other": [f"row {n}" for n in range(HALF)], name: values})
        pq.write_table(table, folder / "metadata" / f"{number}.parquet")
    return folder


def attempt(folder, out, *words):
    """Run dedup; return the exit status, its one line, and whether it came to search."""
    searched = []

    def search(*given):
        searched.append(1)
        return found(*given)

    found = run.search_pairs
    with mock.patch.object(run, "search_pairs", search):
        status, _, line = truth.snip("dedup", folder, "--out", out, *words)
    return status, line, bool(searched)


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        (kind, use)
        for kind in COLUMNS
        for use in USES
        if use not in FEW or kind in ("string_view", "uint64", "binary", "binary_view", "struct")
    ],
)
def test_a_column_is_taken_or_refused_before_the_search(tmp_path, kind, use):
    name, *words = USES[use]
    folder, out = write_set(tmp_path / "set", name, COLUMNS[kind]), tmp_path / "out"
    status, line, searched = attempt(folder, out, *words)
    if use in TAKEN:
        assert (status == 0) == (kind in TAKEN[use]), line
    if status == 0:
        assert searched
        assert pq.read_table(out / "metadata").num_rows == HALF
        return
    if use == "list" and searched:  # of values, not of types: known when it is decided
        assert "share their c" in line or "no c" in line
        return
    assert (status, searched) == (1, False), line
    assert not out.exists()
    found = str(pq.read_schema(folder / "metadata" / "0.parquet").field(name).type)
    found = found.replace("_view", "")
    if use != "uids" or kind not in TEXTS:
        assert name in line, line
        by_value = use == "keep" and f"column {name!r} is 'a', expected a time" in line
        assert by_value == (use == "keep" and found in ("string", "large_string")), line
        assert by_value or found.partition("<")[0] in line, line
        assert "expected" in line
    if use != "keep" or kind != "dictionary":  # refused by its type in all files at once
        assert str(folder / "metadata" / "0.parquet") in line


def test_each_file_is_tried(tmp_path):
    """The first file's keys are texts, the second one's bytes are none."""
    folder = write_set(tmp_path / "set", "hash", COLUMNS["string"])
    table = pa.table({"other": ["x"] * HALF, "hash": COLUMNS["binary"]})
    pq.write_table(table, folder / "metadata" / "1.parquet")
    status, line, searched = attempt(folder, tmp_path / "out")
    assert (status, searched) == (1, False)
    assert str(folder / "metadata" / "1.parquet") in line
    assert "'hash' is binary, expected texts or numbers" in line
    assert "--key" in line
    assert attempt(folder, tmp_path / "out", "--key", "other")[0] == 0


def test_views_are_texts_in_what_is_written(tmp_path):
    folder = write_set(tmp_path / "set", "key", COLUMNS["string_view"])
    assert attempt(folder, tmp_path / "out")[0] == 0
    kept = pq.read_table(tmp_path / "out" / "metadata" / "0.parquet")
    assert kept["key"].to_pylist() == COLUMNS["string_view"].to_pylist()
    groups = pq.read_table(tmp_path / "out" / "groups.parquet")
    assert groups["key"].to_pylist()[:6] == [v for v in ["a", "b", None] for _ in range(2)]


def test_a_plan_refuses_what_the_run_would(tmp_path):
    folder = write_set(tmp_path / "set", "url", COLUMNS["struct"])
    status, _, line = truth.snip("dedup", folder, "--dry_run")
    assert status == 1
    assert "'url' is struct" in line


@pytest.mark.parametrize(
    "words", [("--on", "c", "--keys", "set/metadata"), ("--export", "keys", "--key", "c")]
)
@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_filter_refuses_before_it_writes(tmp_path, monkeypatch, kind, words):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", "c", COLUMNS[kind])
    np.save("mask.npy", np.arange(ROWS) % 2 == 0)
    status, _, line = truth.snip(
        "filter", "set/metadata", "--is_dup", "mask.npy", "--out", "out", *words
    )
    assert status == 1
    assert "column 'c'" in line
    assert "0.parquet" in line
    assert words[0] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["string_view", "list of string_view", "binary_view"])
def test_filter_takes_views(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", "c", COLUMNS[kind])
    np.save("mask.npy", np.arange(ROWS) % 2 == 0)
    assert truth.snip("filter", "set/metadata", "--is_dup", "mask.npy", "--out", "out")[0] == 0
    kept = pq.read_table("out/1.parquet")["c"].to_pylist()
    assert kept == COLUMNS[kind].to_pylist()[1::2]
