"""Tables, tensors and files of other libraries: the same rows are removed as of numpy's array."""

from __future__ import annotations

import gc
import os
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
import truth

import snipdedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import open_features

ROWS = truth.clustered(600, 16, 3, clusters=150, noise=0.3, copies=0.1)
WANT = snipdedup.dedup(ROWS, threshold=0.9, method="exact").is_dup
IDS = np.arange(len(ROWS))
FLAT = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 16)
TABLE = pa.table({"id": IDS, "emb": FLAT})


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files; no copy may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    gc.collect()
    assert list(folder.glob("snip-*")) == []


class Offers:
    """An array that offers only some ways to be read."""

    def __init__(self, *ways):
        for way in ways:
            setattr(type(self), way, lambda self, *a, way=way, **k: getattr(ROWS, way)(*a, **k))


def with_list(kind):
    return TABLE.set_column(1, "emb", FLAT.cast(kind))


def as_tensor():
    kind = pa.fixed_shape_tensor(pa.float32(), (4, 4))
    return pa.table({"id": IDS, "emb": pa.ExtensionArray.from_storage(kind, FLAT)})


def pandas_frame(pandas):
    return pandas.DataFrame({"id": IDS, "emb": list(ROWS)})


def hf_array(datasets):
    kinds = {"id": datasets.Value("int64"), "emb": datasets.Array2D((4, 4), "float32")}
    columns = {"id": IDS, "emb": ROWS.reshape(-1, 4, 4)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def hf_reversed(datasets):
    """A data set whose own order is not that of its file."""
    return datasets.Dataset(TABLE[::-1].combine_chunks()).select(IDS[::-1])


def lance_set(lance):
    folder = f"{tempfile.gettempdir()}/../set.lance"
    return lance.write_dataset(TABLE, folder)


MEMORY = {
    "torch": lambda: torch.from_numpy(ROWS),
    "__array__": lambda: type("A", (Offers,), {})("__array__"),
    "dlpack": lambda: type("D", (Offers,), {})("__dlpack__", "__dlpack_device__"),
    "list of tensors": lambda: list(torch.from_numpy(ROWS).split(250)),
}
TABLES = {
    "fixed lists": (None, lambda _: TABLE),
    "lists": (None, lambda _: with_list(pa.list_(pa.float32()))),
    "large lists": (None, lambda _: with_list(pa.large_list(pa.float32()))),
    "tensors": (None, lambda _: as_tensor()),
    "batch": (None, lambda _: TABLE.combine_chunks().to_batches()[0]),
    "reader": (None, lambda _: TABLE.to_reader(70)),
    "dataset": (None, lambda _: pyarrow.dataset.dataset(TABLE)),
    "pandas": ("pandas", pandas_frame),
    "polars": ("polars", lambda polars: polars.from_arrow(TABLE)),
    "duckdb": ("duckdb", lambda duckdb: duckdb.from_arrow(TABLE)),
    "datasets": ("datasets", hf_reversed),
    "datasets, arrays": ("datasets", hf_array),
    "datasets, streamed": ("datasets", lambda d: d.Dataset(TABLE).to_iterable_dataset()),
    "lance": ("lance", lance_set),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_arrays_of_other_libraries(kind):
    assert np.array_equal(snipdedup.dedup(MEMORY[kind](), threshold=0.9).is_dup, WANT)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_and_their_other_columns(kind, tmp_path):
    module, make = TABLES[kind]
    table = make(module and pytest.importorskip(module))
    result = snipdedup.dedup(table, threshold=0.9, out=tmp_path / "out")
    assert np.array_equal(result.is_dup, WANT)
    kept = pq.read_table(tmp_path / "out" / "metadata" / "table.parquet")
    assert kept.column_names == ["id", "dup_count"]
    assert np.array_equal(kept["id"], IDS[~WANT])
    assert snipdedup.dedup(TABLE, threshold=0.95).removed < WANT.sum()


def test_a_column_alone():
    for column in (FLAT, pa.chunked_array([FLAT[:100], FLAT[100:]])):
        assert np.array_equal(open_features(column).read(0, 600), ROWS)
    series = pytest.importorskip("pandas").Series(list(ROWS))
    if not hasattr(series, "__arrow_c_stream__"):
        pytest.skip("a series of pandas before 3.0 offers no stream; its frame does")
    assert np.array_equal(open_features(series).read(0, 600), ROWS)


def test_bfloat16_is_widened():
    tensor = torch.from_numpy(ROWS).bfloat16()
    features = open_features(tensor)
    assert features.dtype == np.float32
    assert np.array_equal(features.read(0, 600), tensor.float().numpy())


def save_safetensors(path, arrays):
    pytest.importorskip("safetensors.numpy").save_file(arrays, path)


def save_torch(path, arrays):
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def save_hdf5(path, arrays):
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def save_zarr(path, arrays):
    group = pytest.importorskip("zarr").open_group(str(path), mode="w")
    for name, array in arrays.items():
        made = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=array.shape)
        made[:] = array


FILES = {
    "x.safetensors": save_safetensors,
    "x.pt": save_torch,
    "x.h5": save_hdf5,
    "x.zarr": save_zarr,
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_libraries(name, tmp_path):
    path = tmp_path / name
    FILES[name](path, {"emb": ROWS, "ids": IDS})
    result = snipdedup.dedup(path, threshold=0.9, out=tmp_path / "out")
    assert np.array_equal(result.is_dup, WANT)
    assert result.groups["shard"][0].as_py() == name
    again = snipdedup.open_result(tmp_path / "out")  # by its path, unlike a table
    assert again.groups.equals(result.groups)
    again = snipdedup.dedup(path, array="emb", threshold=0.9)
    assert np.array_equal(again.is_dup, WANT)
    for array, told in (("x", "no array 'x'"), ("ids", r"found (int64|shape|\(600)")):
        with pytest.raises(SnipError, match=told):
            snipdedup.dedup(path, array=array)


@pytest.mark.parametrize("name", FILES)
def test_files_of_several_arrays_or_that_are_damaged(name, tmp_path):
    path = tmp_path / name
    FILES[name](path, {"a": ROWS, "b": ROWS[:50]})
    told = "expected one 2-D array, found 2; choose one with --array: (a, b|b, a)"
    with pytest.raises(SnipError, match=told):
        open_features(path)
    assert np.array_equal(open_features(path, array="b").read(0, 50), ROWS[:50])
    if path.is_file():
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(SnipError, match=rf"{name}: truncated or not a \{path.suffix}: \S"):
            open_features(path)


def test_a_lance_folder_is_a_table(tmp_path):
    lance = pytest.importorskip("lance")
    lance.write_dataset(TABLE, str(tmp_path / "x.lance"))
    result = snipdedup.dedup(tmp_path / "x.lance", threshold=0.9, out=tmp_path / "out")
    assert np.array_equal(result.is_dup, WANT)
    kept = pq.read_table(tmp_path / "out" / "metadata" / "x.lance.parquet")
    assert np.array_equal(kept["id"], IDS[~WANT])


def test_nothing_that_a_torch_file_holds_is_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"emb": Runs()}, tmp_path / "x.pt")
    with pytest.raises(SnipError, match=r"x.pt: truncated or not a \.pt: Weights only load"):
        open_features(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "x.h5").write_bytes(b"1")
    told = r"x.h5: a .h5 needs h5py: pip install 'snipdedup-toolkit\[hdf5\]'"
    with pytest.raises(SnipError, match=told):
        open_features(tmp_path / "x.h5")


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ({"a": FLAT, "b": FLAT}, None, "expected one list column of floats, found several: a, b;"),
        ({"id": IDS}, None, "found none among id; name it with column="),
        ({"a": FLAT}, "b", "table: no column 'b'; it has a"),
        ({"id": IDS}, "id", "table: column 'id' is int64, not a list of floats"),
        ({"a": [[1.0], None]}, None, "table: row 1 of column 'a' is null, expected 1 values"),
        ({"a": [[1.0], [None]]}, None, "table: row 1 of column 'a' holds a null value"),
        ({"a": [[1.0]] * 9000 + [[1.0, 2.0]]}, None, "row 9000 of column 'a' is a list of 2, exp"),
        ({"a": [[[1.0], [2.0]], [[3.0]]]}, "a", "row 1 of column 'a' is a list of 1, expected 2"),
        ({"a": pa.array([], pa.list_(pa.float32()))}, None, "no rows at all in table"),
    ],
)
def test_tables_that_are_refused(table, column, message):
    with pytest.raises(SnipError, match=message):
        snipdedup.dedup(pa.table(table), column=column)


def test_types_that_are_refused():
    for given in (7, {"train": TABLE}, object()):
        with pytest.raises(TypeError, match=r"^features are a 2-D array .* found \S+; for rows"):
            snipdedup.dedup(given)
    with pytest.raises(UsageError, match="found object in list"):
        snipdedup.dedup([TABLE, object()])


def test_lists_of_lists_are_flattened_where_they_are_named():
    table = pa.table({"a": ROWS.reshape(-1, 4, 4).tolist(), "b": ROWS.tolist()})
    assert np.array_equal(open_features(table, column="a").read(0, 600), ROWS.astype(float))
    assert np.array_equal(open_features(table).read(0, 600), ROWS.astype(float))


def test_the_same_table_is_the_same_input_and_another_is_not(tmp_path):
    snipdedup.dedup(TABLE, threshold=0.9, out=tmp_path / "out")
    before = truth.listing(tmp_path / "out")
    snipdedup.dedup(TABLE, threshold=0.9, out=tmp_path / "out")
    assert truth.listing(tmp_path / "out") == before
    other = TABLE.set_column(1, "emb", pa.FixedSizeListArray.from_arrays(FLAT.values[::-1], 16))
    for table in (other, TABLE.set_column(0, "id", pa.array(IDS[::-1]))):
        with pytest.raises(SnipError, match=r"another input|--overwrite"):
            snipdedup.dedup(table, threshold=0.9, out=tmp_path / "out")


def test_the_copy_lives_as_long_as_the_result(temporary):
    result = snipdedup.dedup(TABLE, threshold=0.9)
    assert len(list(temporary.iterdir())) == 1
    assert result.at(0.95).removed < result.removed  # reads raw rows
    if (child := os.fork()) == 0:
        del result
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(temporary.iterdir())) == 1


def test_siblings_take_tables(tmp_path):
    settings = {"dim": 8, "steps": 2, "threads": 1}
    snipdedup.train(TABLE, out=tmp_path / "encoder", **settings)
    found = snipdedup.compress(TABLE, encoder=tmp_path / "encoder", out=tmp_path / "descriptors")
    assert np.load(found.files[0]).shape == (600, 8)
    snipdedup.build_index(TABLE, out=tmp_path / "index")
    asked = {"index": tmp_path / "index", "k": 3, "features": TABLE}
    answers = snipdedup.search(TABLE[5:7], **asked).answers
    assert [answer.neighbours[0].row for answer in answers] == [5, 6]
    one = snipdedup.search(torch.from_numpy(ROWS[5]), **asked).answers
    assert [near.row for near in one[0].neighbours] == [n.row for n in answers[0].neighbours]
    snipdedup.dedup(TABLE, threshold=0.9, out=tmp_path / "out")
    assert snipdedup.audit(tmp_path / "out", TABLE).passed
    with pytest.raises(SnipError, match="names no features"):
        snipdedup.audit(tmp_path / "out")
    part = snipdedup.dedup(TABLE[:50], reference=[TABLE[50:]], threshold=0.9)
    assert part.is_dup.sum() > WANT[:50].sum()
