"""Metadata: opened by name, matched with features, and the rows that stay written unchanged."""

from __future__ import annotations

import csv
import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.metadata import kept_rows as md_write
from snipdedup.metadata import tables as md
from snipdedup.metadata.additions import DupCounts, RemovedPairs
from snipdedup.metadata.kept_rows import write_kept

# Of 12 rows 1, 4, 5 and 11 go, for 0, 0, 6 and 10.
REMOVED = DupCounts(RemovedPairs(np.array([1, 4, 5, 11]), np.array([0, 0, 6, 10])))


def write(path, rows, begin=0, **options):
    """A plain metadata file whose key says which global row it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = pa.array([f"k{i}" for i in range(begin, begin + rows)], pa.string())
    pq.write_table(pa.table({"key": key, "n": np.arange(begin, begin + rows)}), path, **options)
    return path


def awkward(rows):
    """Every kind of column that a crawl brings."""
    number = range(rows)
    table = pa.table(
        {
            "URL": pa.array([None if i % 7 == 3 else f"http://x/{i}" for i in number]),
            "required": pa.array(number, pa.int32()),
            "tags": pa.array([None if i % 5 == 0 else ["a"] * (i % 3) for i in number]),
            "feature": pa.array(
                [list(np.float16([i, i + 0.5])) for i in number], pa.list_(pa.float16(), 2)
            ),
            "box": pa.array([None if i % 4 == 1 else {"x": i, "y": str(i)} for i in number]),
            "seen": pa.array(number, pa.timestamp("ns", "Europe/Zurich")),
            "licence": pa.array(["by", "cc0", None] * rows)[:rows].dictionary_encode(),
            "code": pa.array(["a", "b"] * rows)[:rows].cast(pa.dictionary(pa.int8(), pa.string())),
            "long": pa.array([f"{i}" for i in number], pa.large_string()),
            "price": pa.array([None] * rows, pa.decimal128(9, 2)),
            "nothing": pa.nulls(rows),
            "sha": pa.array([bytes([i % 256]) * 4 for i in number], pa.binary(4)),
        }
    )
    required = pa.field("required", pa.int32(), nullable=False, metadata={"unit": "px"})
    return table.cast(table.schema.set(1, required).with_metadata({"huggingface": "{}"}))


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "none"])
def test_awkward_columns_come_back_as_they_were(tmp_path, codec):
    table = awkward(500)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=64, compression=codec)
    is_dup = np.random.default_rng(0).random(500) < 0.4
    (path,) = write_kept(md.open_metadata(tmp_path), is_dup, tmp_path / "out")
    found = pq.read_table(path)
    assert found.schema.equals(pq.read_schema(tmp_path / "a.parquet"), check_metadata=True)
    assert found.equals(pq.read_table(tmp_path / "a.parquet").filter(pa.array(~is_dup)))
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert chunk.compression == {"none": "UNCOMPRESSED"}.get(codec, codec.upper())


def test_dup_count_follows_the_rows_that_stay(tmp_path):
    for part, (begin, rows) in enumerate([(0, 5), (5, 0), (5, 7)]):
        write(tmp_path / f"m_{part}.parquet", rows, begin, row_group_size=3)
    is_dup = np.zeros(12, bool)
    is_dup[[1, 4, 5, 11]] = True
    paths = write_kept(md.open_metadata(tmp_path), is_dup, tmp_path / "out", [REMOVED])
    assert [p.name for p in paths] == ["m_0.parquet", "m_1.parquet", "m_2.parquet"]
    found = pa.concat_tables(map(pq.read_table, paths)).to_pydict()
    assert found["key"] == [f"k{i}" for i in (0, 2, 3, 6, 7, 8, 9, 10)]
    assert found["dup_count"] == [2, 0, 0, 1, 0, 0, 0, 1]
    assert pq.read_schema(paths[1]).field("dup_count").type == pa.int64()


def test_a_file_of_which_nothing_stays_is_written_with_no_rows(tmp_path):
    write(tmp_path / "m.parquet", 6)
    (path,) = write_kept(md.open_metadata(tmp_path), np.ones(6, bool), tmp_path / "out")
    assert pq.read_table(path).num_rows == 0
    assert pq.read_schema(path).names == ["key", "n"]


def test_a_mask_of_another_length_is_refused_before_anything_is_written(tmp_path):
    write(tmp_path / "m.parquet", 6)
    with pytest.raises(SnipError, match=r"m\.parquet has 6 rows, the mask has 5"):
        write_kept(md.open_metadata(tmp_path), np.zeros(5, bool), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_batches_give_the_same_rows_as_one(tmp_path, monkeypatch):
    table = awkward(300)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    meta = md.open_metadata(tmp_path)
    is_dup = np.random.default_rng(1).random(300) < 0.7
    counts = [DupCounts(RemovedPairs(np.arange(200), np.repeat(np.arange(100) * 3, 2)))]
    (one,) = write_kept(meta, is_dup, tmp_path / "one", counts)
    monkeypatch.setattr(md, "BATCH_ROWS", 7)
    monkeypatch.setattr(md_write, "FLUSH_ROWS", 11)
    (many,) = write_kept(meta, is_dup, tmp_path / "many", counts)
    assert pq.read_table(many).equals(pq.read_table(one))
    assert pq.ParquetFile(many).num_row_groups > 3
    expected = np.where(np.arange(300) % 3 == 0, 2, 0)[~is_dup]
    assert pq.read_table(one)["dup_count"].to_pylist() == expected.tolist()


def test_a_masked_memmap_will_do(tmp_path):
    write(tmp_path / "m.parquet", 4)
    np.save(tmp_path / "mask.npy", np.array([True, False, True, False]))
    mask = np.load(tmp_path / "mask.npy", mmap_mode="r")
    (path,) = write_kept(md.open_metadata(tmp_path / "m.parquet"), mask, tmp_path / "out")
    assert pq.read_table(path)["n"].to_pylist() == [1, 3]


def test_a_dup_count_that_is_there_already_is_refused(tmp_path):
    pq.write_table(pa.table({"dup_count": [1, 2]}), tmp_path / "m.parquet")
    meta = md.open_metadata(tmp_path)
    nothing = [DupCounts(RemovedPairs(np.zeros(0, np.int64), np.zeros(0, np.int64)))]
    with pytest.raises(SnipError, match=r"m\.parquet has a column dup_count already"):
        write_kept(meta, np.zeros(2, bool), tmp_path / "out", nothing)
    assert not (tmp_path / "out").exists()
    (path,) = write_kept(meta, np.zeros(2, bool), tmp_path / "out")
    assert pq.read_table(path)["dup_count"].to_pylist() == [1, 2]


def test_two_files_of_one_name_are_refused(tmp_path):
    write(tmp_path / "a" / "m.parquet", 2)
    write(tmp_path / "b" / "m.parquet", 2)
    meta = md.open_metadata(f"{tmp_path}/*/m.parquet")
    with pytest.raises(SnipError, match=r"would both be written as m\.parquet"):
        write_kept(meta, np.zeros(4, bool), tmp_path / "out")


def test_real_crawl_keeps_its_pandas_index(data, tmp_path):
    source = data / "small" / "url_text_10000.parquet"
    is_dup = np.random.default_rng(2).random(10_000) < 0.3
    (path,) = write_kept(md.open_metadata(source), is_dup, tmp_path)
    assert pq.read_schema(path).equals(pq.read_schema(source), check_metadata=True)
    assert pq.read_table(path).equals(pq.read_table(source).filter(pa.array(~is_dup)))


@pytest.mark.parametrize(
    ("name", "rows"), [("chia500/metadata.csv", 500), ("shopsphere/metadata2.csv", 1126)]
)
def test_real_csv_becomes_parquet_with_the_same_texts(data, tmp_path, name, rows):
    with (data / "small" / name).open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    meta = md.open_metadata(data / "small" / name)
    assert meta.rows == rows == len(lines)
    is_dup = np.random.default_rng(3).random(rows) < 0.5
    (path,) = write_kept(meta, is_dup, tmp_path)
    assert path.suffix == ".parquet"
    found = pq.read_table(path)
    assert found.schema.names == header
    stay = [line for line, dup in zip(lines, is_dup, strict=True) if not dup]
    assert [list(row.values()) for row in found.to_pylist()] == stay


def test_every_csv_column_is_text(tmp_path):
    (tmp_path / "m_0.csv").write_text('id,zip,score,gap,note\n1,007,1e-05,,"a, ""b""\nc"\n')
    (tmp_path / "m_1.csv").write_text("id,zip,score,gap,note\n2,123,0.50,5,x\n")
    (tmp_path / "m_2.csv").write_text("id,zip,score,gap,note\n")
    meta = md.open_metadata(tmp_path)
    assert [file.rows for file in meta.files] == [1, 1, 0]
    paths = write_kept(meta, np.zeros(2, bool), tmp_path / "out")
    assert pq.read_table(paths[0]).to_pylist() == [
        {"id": "1", "zip": "007", "score": "1e-05", "gap": "", "note": 'a, "b"\nc'}
    ]
    assert pq.read_table(paths[1]).to_pylist() == [
        {"id": "2", "zip": "123", "score": "0.50", "gap": "5", "note": "x"}
    ]
    assert [pq.read_schema(path).types for path in paths] == [[pa.string()] * 5] * 3


def test_files_come_in_natural_order_and_parquet_before_csv(tmp_path):
    write(tmp_path / "m_10.parquet", 1, 10)
    write(tmp_path / "m_2.parquet", 1, 2)
    write(tmp_path / "inner" / "m_0.parquet", 1)
    (tmp_path / "m_3.csv").write_text("key\nx\n")
    (tmp_path / ".m_1.parquet").write_bytes(b"hidden")
    meta = md.open_metadata(tmp_path)
    assert [file.path.name for file in meta.files] == ["m_2.parquet", "m_10.parquet"]
    assert meta.offsets.tolist() == [0, 1, 2]
    assert meta.take("key", np.arange(2)).to_pylist() == ["k2", "k10"]


def test_columns_are_found_in_any_case(tmp_path):
    pq.write_table(pa.table({"URL": ["u"], "KEY": ["k"], "Uid": ["d"]}), tmp_path / "m.parquet")
    meta = md.open_metadata(tmp_path)
    assert meta.column() == "KEY"
    assert meta.column("url") == "URL"
    assert meta.column(None, ("hash", "uid")) == "Uid"
    assert meta.column(None, ("hash",)) is None
    with pytest.raises(SnipError, match="column 'caption' is not there; its columns: URL, KEY, U"):
        meta.column("caption")


def test_a_column_that_could_be_two_is_refused(tmp_path):
    pq.write_table(pa.table({"url": ["a"], "URL": ["b"]}), tmp_path / "m.parquet")
    meta = md.open_metadata(tmp_path)
    assert meta.column("URL") == "URL"
    with pytest.raises(SnipError, match="could be url or URL"):
        meta.column("Url")


def test_take_reads_only_the_row_groups_it_needs(tmp_path, monkeypatch):
    write(tmp_path / "m_0.parquet", 50, 0, row_group_size=10)
    write(tmp_path / "m_1.parquet", 50, 50, row_group_size=10)
    write(tmp_path / "m_2.parquet", 50, 100, row_group_size=10)
    meta = md.open_metadata(tmp_path)
    read = []
    plain = pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        read.extend(options["row_groups"])
        return plain(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    rows = np.array([0, 9, 33, 100, 149])
    assert meta.take("key", rows).to_pylist() == [f"k{i}" for i in rows]
    assert read == [0, 3, 0, 4]


@pytest.mark.parametrize("count", [0, 1, 40, 300])
def test_take_equals_indexing(tmp_path, monkeypatch, count):
    monkeypatch.setattr(md, "BATCH_ROWS", 13)
    for part, begin in enumerate(range(0, 300, 100)):
        write(tmp_path / f"m_{part}.parquet", 100, begin, row_group_size=30)
    (tmp_path / "m.csv").write_text("key,n\n" + "".join(f"k{i},{i}\n" for i in range(300)))
    rows = np.sort(np.random.default_rng(4).choice(300, count, replace=False))
    for spec in (tmp_path, tmp_path / "m.csv"):
        meta = md.open_metadata(spec)
        assert meta.take("key", rows).to_pylist() == [f"k{i}" for i in rows]
        assert meta.take("n", rows).to_pylist() == [str(i) for i in rows]


def test_take_gives_texts_of_every_plain_type(tmp_path):
    table = awkward(9)
    pq.write_table(table, tmp_path / "m.parquet")
    meta = md.open_metadata(tmp_path)
    rows = np.array([0, 2, 3])
    assert meta.take("URL", rows).to_pylist() == ["http://x/0", "http://x/2", None]
    assert meta.take("licence", rows).to_pylist() == ["by", None, "by"]
    assert meta.take("long", rows).to_pylist() == ["0", "2", "3"]
    with pytest.raises(SnipError, match="column 'box' is struct"):
        meta.take("box", rows)


def test_metadata_must_match_the_features_file_by_file(tmp_path):
    for part, rows in enumerate((3, 4)):
        np.save(tmp_path / f"f_{part}.npy", np.ones((rows, 2), np.float32))
    features = open_features(tmp_path)
    good = tmp_path / "good"
    write(good / "m_0.parquet", 3)
    write(good / "m_1.parquet", 4)
    md.open_metadata(good).check_matches(features.describe())
    md.open_metadata(write(tmp_path / "one" / "m.parquet", 7)).check_matches(features.describe())
    write(tmp_path / "swapped" / "m_0.parquet", 4)
    write(tmp_path / "swapped" / "m_1.parquet", 3)
    with pytest.raises(SnipError, match=r"m_0\.parquet has 4 rows, its features .*f_0\.npy have 3"):
        md.open_metadata(tmp_path / "swapped").check_matches(features.describe())
    short = md.open_metadata(write(tmp_path / "short" / "m.parquet", 6))
    with pytest.raises(SnipError, match="6 rows of metadata, but 7 rows of features"):
        short.check_matches(features.describe())


def test_wrong_files_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "whole.parquet", 100).read_bytes()
    cases = {
        "cut.parquet": (whole[:-20], "truncated or not a parquet file"),
        "page.parquet": (b"<html>404</html>", "truncated or not a parquet file"),
        "empty.parquet": (b"", "empty file"),
        "empty.csv": (b"", "empty file"),
        "ragged.csv": (b"a,b\n1,2\n3\n", "not a CSV with one kind of row"),
        "twice.csv": (b"a,a\n1,2\n", "several columns"),
        "notes.txt": (b"hello", "expected metadata of type"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SnipError, match=message) as caught:
            md.open_metadata(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "none").mkdir()
    for spec in ("none", "absent", "absent_*.parquet"):
        with pytest.raises(SnipError, match=r"no (such )?metadata"):
            md.open_metadata(tmp_path / spec)


def test_a_file_damaged_inside_is_refused_and_not_written(tmp_path):
    path = write(tmp_path / "m.parquet", 5000)
    content = bytearray(path.read_bytes())
    content[40:4000] = bytes(3960)
    path.write_bytes(content)
    with pytest.raises(SnipError, match=r"m\.parquet: damaged"):
        write_kept(md.open_metadata(path), np.zeros(5000, bool), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_with_other_columns_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [1]}), tmp_path / "m_0.parquet")
    pq.write_table(pa.table({"b": [1.5], "a": [1]}), tmp_path / "m_1.parquet")
    assert md.open_metadata(tmp_path).rows == 2
    pq.write_table(pa.table({"a": [1], "c": [1]}), tmp_path / "m_2.parquet")
    with pytest.raises(
        SnipError, match=r"m_2\.parquet and .*m_0\.parquet do not both have the columns b, c"
    ):
        md.open_metadata(tmp_path)


def test_timestamps_keep_their_zone(tmp_path):
    when = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    pq.write_table(
        pa.table({"t": pa.array([when] * 3, pa.timestamp("us", "UTC"))}), tmp_path / "m.parquet"
    )
    (path,) = write_kept(md.open_metadata(tmp_path), np.array([1, 0, 0], bool), tmp_path / "out")
    assert pq.read_table(path)["t"].to_pylist() == [when] * 2


def test_a_large_row_group_is_never_held_whole(tmp_path):
    rows = 400_000
    wide = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(100), rows, [None, pa.py_buffer(np.random.default_rng(0).bytes(100 * rows))]
    )
    pq.write_table(pa.table({"key": wide}), tmp_path / "m.parquet", row_group_size=rows)
    del wide
    file = md.Table(tmp_path / "m.parquet")
    before, most, found = pa.total_allocated_bytes(), 0, 0
    for _, batch in file.batches():
        most = max(most, pa.total_allocated_bytes() - before)
        found += batch.num_rows
    assert found == rows
    assert most < 100 * rows / 2
