"""Each format gives back the rows that were written, and what cannot be features is refused."""

from __future__ import annotations

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snipdedup.errors import SnipError
from snipdedup.features.formats import open_shard

ROWS, DIM = 11, 3
FLOATS = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"]


def rows_of(dtype: str = "<f4", rows: int = ROWS, dim: int = DIM) -> np.ndarray:
    """Rows that differ in each value, exact in float16."""
    return (np.arange(rows * dim).reshape(rows, dim) / 4 - 2).astype(dtype)


def fixed_list(array: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    flat = pa.array(array.ravel(), kind or pa.from_numpy_dtype(array.dtype))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def write_npy(path, array):
    np.save(path, array)


def write_npz(path, array):
    np.savez(path, features=array)


def write_packed_npz(path, array):
    np.savez_compressed(path, features=array)


def write_fixed(path, array):
    pq.write_table(pa.table({"emb": fixed_list(array)}), path, row_group_size=4)


def write_list(path, array):
    column = pa.array(list(array), pa.list_(pa.from_numpy_dtype(array.dtype)))
    pq.write_table(pa.table({"emb": column}), path, row_group_size=4)


def write_large_list(path, array):
    column = pa.array(list(array), pa.large_list(pa.from_numpy_dtype(array.dtype)))
    pq.write_table(pa.table({"key": [""] * len(array), "emb": column}), path, row_group_size=5)


WRITERS = {
    "x.npy": write_npy,
    "stored.npz": write_npz,
    "packed.npz": write_packed_npz,
    "fixed.parquet": write_fixed,
    "list.parquet": write_list,
    "large.parquet": write_large_list,
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """Write an array in one format; return the path."""

    def write(array):
        path = tmp_path / request.param
        WRITERS[request.param](path, array)
        return path

    return write


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_round_trip(written, dtype):
    array = rows_of(dtype)
    shard = open_shard(written(array))
    assert (shard.rows, shard.dim, shard.dtype) == (ROWS, DIM, np.dtype(dtype))
    for start, stop in [(0, ROWS), (0, 1), (3, 4), (4, 9), (ROWS - 1, ROWS), (5, 5)]:
        found = shard.read(start, stop)
        assert found.dtype == dtype
        assert np.array_equal(found, array[start:stop])
        found[:] = 0  # a fresh array: no later read may see this
    assert np.array_equal(shard.read(0, ROWS), array)


@given(picked=st.sets(st.integers(0, ROWS - 1)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_take_is_numpy_indexing(written, picked):
    array = rows_of()
    shard = open_shard(written(array))
    rows = np.array(sorted(picked), np.int64)
    found = shard.take(rows)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array[rows])


@pytest.mark.parametrize("name", ["x.npy", "stored.npz", "packed.npz"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_byte_order_is_made_native(tmp_path, name, dtype):
    array = rows_of(dtype)
    path = tmp_path / name
    WRITERS[name](path, array)
    shard = open_shard(path)
    assert shard.dtype == np.dtype(dtype).newbyteorder("=")
    assert shard.dtype.isnative
    assert np.array_equal(shard.read(2, 7), array[2:7])
    assert np.array_equal(shard.take(np.array([1, 8])), array[[1, 8]])


def test_newer_npy_headers(tmp_path):
    array = rows_of()
    for version in [(1, 0), (2, 0), (3, 0)]:
        path = tmp_path / f"v{version[0]}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array(file, array, version)
        assert np.array_equal(open_shard(path).read(0, ROWS), array)


def test_one_column_and_one_row_are_never_fortran(tmp_path):
    for shape in [(5, 1), (1, 5)]:
        np.save(tmp_path / "x.npy", np.asfortranarray(np.ones(shape, np.float32)))
        assert open_shard(tmp_path / "x.npy").read(0, shape[0]).shape == shape


def test_npz_of_several_arrays(tmp_path):
    images, texts = rows_of(), rows_of(rows=4)
    for save in (np.savez, np.savez_compressed):
        path = tmp_path / "both.npz"
        save(path, b32_img=images, b32_txt=texts, l14_img=images * 2)
        assert np.array_equal(open_shard(path, array="b32_txt").read(0, 4), texts)
        assert np.array_equal(open_shard(path, array="l14_img").read(0, ROWS), images * 2)
        with pytest.raises(SnipError, match=r"both.npz: several arrays.*b32_img, b32_txt, l14_img"):
            open_shard(path)
        with pytest.raises(SnipError, match=r"both.npz: no array 'img'.*b32_img, b32_txt"):
            open_shard(path, array="img")


def test_a_packed_npz_that_changed_is_read_again(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=rows_of())
    assert np.array_equal(open_shard(path).read(0, 2), rows_of()[:2])
    np.savez_compressed(path, x=rows_of(rows=40) * 2)
    assert np.array_equal(open_shard(path).read(0, 40), rows_of(rows=40) * 2)


def test_parquet_of_several_columns(tmp_path):
    path = tmp_path / "x.parquet"
    a, b = rows_of(), rows_of("<f8", dim=5)
    pq.write_table(pa.table({"a": fixed_list(a), "id": range(ROWS), "b": fixed_list(b)}), path)
    assert np.array_equal(open_shard(path, column="b").read(0, ROWS), b)
    with pytest.raises(SnipError, match=r"x.parquet: .*several: a, b; name it with --column"):
        open_shard(path)
    with pytest.raises(SnipError, match=r"x.parquet: no column 'c'; it has a, id, b"):
        open_shard(path, column="c")
    with pytest.raises(SnipError, match=r"x.parquet: column 'id' is int64, not a list of floats"):
        open_shard(path, column="id")


def test_parquet_of_two_columns_of_one_name(tmp_path):
    path, x = tmp_path / "x.parquet", fixed_list(rows_of())
    pq.write_table(pa.Table.from_arrays([x, x], names=["x", "x"]), path)
    for column in (None, "x"):
        with pytest.raises(SnipError, match=r"x.parquet: 2 columns are called 'x'; expected one"):
            open_shard(path, column=column)


def test_parquet_without_a_list_column(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"key": ["a"], "tags": pa.array([[1, 2]])}), path)
    with pytest.raises(SnipError, match=r"x.parquet: .*found none among key, tags"):
        open_shard(path)


@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_sliced_and_chunked_columns(tmp_path, kind):
    array = rows_of()
    column = fixed_list(array) if kind == "fixed" else pa.array(list(array))
    chunked = pa.chunked_array([column.slice(1, 3), column.slice(0, 0), column.slice(5, 6)])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"emb": chunked}), path)
    expected = np.concatenate([array[1:4], array[5:11]])
    assert np.array_equal(open_shard(path).read(0, 9), expected)
    assert np.array_equal(open_shard(path).take(np.array([0, 3, 8])), expected[[0, 3, 8]])


def test_an_empty_row_group_in_the_middle(tmp_path):
    array = rows_of()
    path = tmp_path / "x.parquet"
    table = pa.table({"emb": fixed_list(array)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for piece in (table.slice(0, 4), table.slice(0, 0), table.slice(4, 7)):
            writer.write_table(piece)
    assert pq.ParquetFile(path).num_row_groups == 3
    shard = open_shard(path)
    assert np.array_equal(shard.read(0, ROWS), array)
    assert np.array_equal(shard.take(np.array([3, 4])), array[[3, 4]])


def test_an_empty_first_row_group(tmp_path):
    array = rows_of()
    path = tmp_path / "x.parquet"
    table = pa.table({"emb": list(array)})
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert np.array_equal(open_shard(path).read(0, ROWS), array)


@pytest.mark.parametrize("row", [0, 6])
@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_a_null_row_is_named(tmp_path, row, kind):
    lists: list = rows_of().tolist()
    lists[row] = None
    path = tmp_path / "x.parquet"
    type_ = pa.list_(pa.float32(), DIM) if kind == "fixed" else pa.list_(pa.float32())
    try:
        pq.write_table(pa.table({"emb": pa.array(lists, type_)}), path, row_group_size=4)
        pq.read_table(path)
    except pa.ArrowException as error:  # of fixed lists, in early versions
        pytest.skip(f"this pyarrow writes no null lists: {error}")
    with pytest.raises(SnipError, match=rf"x.parquet: row {row} of column 'emb' is null"):
        open_shard(path).read(0, ROWS)


@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_a_null_value_is_named(tmp_path, kind):
    lists: list = rows_of().tolist()
    lists[6][1] = None
    path = tmp_path / "x.parquet"
    type_ = pa.list_(pa.float32(), DIM) if kind == "fixed" else pa.list_(pa.float32())
    pq.write_table(pa.table({"emb": pa.array(lists, type_)}), path, row_group_size=4)
    with pytest.raises(SnipError, match=r"x.parquet: row 6 of column 'emb' holds a null value"):
        open_shard(path).read(0, ROWS)


@pytest.mark.parametrize("wrong", [[], [1.0], [1.0] * 4])
def test_a_list_of_another_length_is_named(tmp_path, wrong):
    lists = rows_of().tolist()
    lists[9] = wrong
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"emb": pa.array(lists, pa.list_(pa.float32()))}), path)
    expected = rf"x.parquet: row 9 of column 'emb' is a list of {len(wrong)}, expected 3 values"
    with pytest.raises(SnipError, match=expected):
        open_shard(path).read(0, ROWS)


REFUSED = {
    "1-D": (np.ones(5, np.float32), r"expected a 2-D array \(rows, width\), found shape \(5,\)"),
    "3-D": (np.ones((2, 2, 2), np.float32), r"found shape \(2, 2, 2\)"),
    "scalar": (np.float32(1), r"found shape \(\)"),
    "boolean": (np.ones((5, 2), bool), "found bool; this looks like a mask"),
    "mask": (np.ones(5, bool), "found bool; this looks like a mask"),
    "integer": (np.ones((5, 2), np.int64), "expected float16, float32 or float64.*found int64"),
    "complex": (np.ones((5, 2), np.complex64), "found complex64"),
    "text": (np.full((5, 2), "x"), "found <U1"),
    "record": (np.zeros(5, "u8,u8"), "expected float16, float32 or float64"),
    "no width": (np.ones((5, 0), np.float32), "its 5 rows have width 0"),
    "long double": (np.ones((5, 2), np.longdouble), "expected float16, float32 or float64"),
}


@pytest.mark.parametrize("name", ["x.npy", "stored.npz", "packed.npz"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_features_are_not(tmp_path, name, what):
    array, message = REFUSED[what]
    WRITERS[name](tmp_path / name, array)
    with pytest.raises(SnipError, match=f"{name}: .*{message}"):
        open_shard(tmp_path / name)


class Trap:
    """Unpickling this would touch a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_objects_are_never_unpickled(tmp_path, save):
    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    array = np.empty((2, 2), object)
    array[:] = Trap(tmp_path / "touched")
    save(path, array)
    with pytest.raises(SnipError, match=rf"{path.name}: .*found object"):
        open_shard(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["x.npy", "stored.npz", "packed.npz"])
def test_fortran_order_is_refused(tmp_path, name):
    WRITERS[name](tmp_path / name, np.asfortranarray(rows_of()))
    with pytest.raises(SnipError, match=rf"{name}: Fortran-ordered.*ascontiguousarray"):
        open_shard(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.97])
def test_truncated_files(tmp_path, name, left):
    path = tmp_path / name
    WRITERS[name](path, rows_of(rows=500))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    expected = "empty file" if left == 0 else "truncated"
    with pytest.raises(SnipError, match=f"{name}: {expected}"):
        open_shard(path)


def test_every_truncation_of_a_npy(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, rows_of())
    whole = path.read_bytes()
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SnipError, match=r"x.npy: truncated"):
            open_shard(path)


def test_longer_than_its_header(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, rows_of())
    path.write_bytes(path.read_bytes() + b"\0")
    promised = rf"shape \(11, 3\) of float32 \({ROWS * DIM * 4} bytes\), found 133"
    with pytest.raises(SnipError, match=rf"x.npy: truncated or damaged: .*{promised}"):
        open_shard(path)


@pytest.mark.parametrize("name", WRITERS)
def test_noise_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93not at all what the name promises" * 9)
    with pytest.raises(SnipError, match=f"{name}: truncated or not"):
        open_shard(tmp_path / name)


def test_a_damaged_packed_npz(tmp_path):
    path = tmp_path / "x.npz"
    rng = np.random.default_rng(0)
    np.savez_compressed(path, x=rng.standard_normal((300, 8)))
    whole = bytearray(path.read_bytes())
    for at in range(60, len(whole) - 200, 997):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(SnipError, match=r"x.npz: "):
            open_shard(path).read(0, 300)


def test_damaged_parquet_pages(tmp_path):
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"emb": fixed_list(rng.standard_normal((300, 8)))}), path)
    whole = bytearray(path.read_bytes())
    whole[4:60] = b"\xff" * 56
    path.write_bytes(whole)
    shard = open_shard(path)
    with pytest.raises(SnipError, match=r"x.parquet: rows 0 to 300 cannot be read"):
        shard.read(0, 300)
    pq.write_table(pa.table({"emb": list(rng.standard_normal((300, 8)))}), path)
    whole = bytearray(path.read_bytes())
    whole[4:60] = b"\xff" * 56
    path.write_bytes(whole)
    with pytest.raises(SnipError, match=r"x.parquet: row 0 cannot be read"):
        open_shard(path)


def test_an_empty_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w"):
        pass
    with pytest.raises(SnipError, match=r"x.npz: .*none here"):
        open_shard(tmp_path / "x.npz")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, rows_of())
    shard = open_shard(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SnipError, match=r"x.npy: .*it changed while it was read"):
        shard.read(5, ROWS)


def test_no_rows_opens_as_no_rows(written):
    shard = open_shard(written(np.empty((0, DIM), np.float32)))
    assert shard.rows == 0
    assert shard.read(0, 0).shape[0] == 0
    assert len(shard.take(np.empty(0, np.int64))) == 0


def test_other_types_and_missing_files(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"weights")
    with pytest.raises(SnipError, match=r"x.pt: expected a file of type .npy, .npz, .parquet"):
        open_shard(tmp_path / "x.pt")
    with pytest.raises(SnipError, match=r"no such file: .*gone.npy"):
        open_shard(tmp_path / "gone.npy")
