"""Hostile and damaged files: refused in one line, without running them or taking their memory.

Each case below once broke a reader, found by ``scripts/fuzz_readers.py``; a short run of that is
here too.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import resource
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from snipdedup import cli
from snipdedup.config import Top
from snipdedup.deduplication.run import dedup
from snipdedup.encoder.network import WEIGHTS, Encoder, Network
from snipdedup.errors import InputError, SnipError
from snipdedup.features.shards import open_features
from snipdedup.index.folder import QUANTISER, Index, load_shard
from snipdedup.index.quantizer import read_quantiser
from snipdedup.inspection import top
from snipdedup.inspection.search import read_vectors
from snipdedup.metadata.masks import open_mask
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage.out_folder import MANIFEST, read_manifest

sys.path.append(str(ROOT / "scripts"))
fuzz_readers = importlib.import_module("fuzz_readers")

ROWS = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
ROWS[200:] = ROWS[:100]


def npy(header: str, data: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    """Return a .npy file with any header."""
    text = header.encode() + b"\n"
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 * version, "little") + text + data


def said(descr: str, shape: str, order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


@pytest.fixture
def memory():
    """Let the test take no more than 512 MB beyond what the process has."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (fuzz_readers.data_size() + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


HEADERS = {
    "objects": npy(said("'|O'", "(2, 2)"), pickle.dumps(fuzz_readers.Evil())),
    "a field of objects": npy(said("[('a', '|O')]", "(2, 2)"), b"\0" * 32),
    "fields": npy(said("[('a', '<f4')]", "(2, 2)"), b"\0" * 16),
    "nothing": npy(said("'|V0'", "(2, 2)")),
    "long text": npy(said("'<U99999999'", "(1,)"), b"\0" * 64),
    "negative": npy(said("'<f4'", "(-2, -2)"), b"\0" * 16),
    "negative rows": npy(said("'<f4'", "(-2, 2)"), b"\0" * 16),
    "huge": npy(said("'<f4'", f"({2**31}, {2**31})"), b"\0" * 16),
    "past 64 bits": npy(said("'<f4'", f"({2**80}, 16)"), b"\0" * 16),
    "product past 64 bits": npy(said("'<f4'", f"({2**62}, 16)")),
    "switches": npy(said("'<f4'", "(True, True)"), b"\0" * 4),
    "too short": npy(said("'<f4'", "(2, 2)"), b"\0" * 15),
    "too long": npy(said("'<f4'", "(2, 2)"), b"\0" * 17),
    "Fortran": npy(said("'<f4'", "(2, 2)", "True"), b"\0" * 16),
    "half a header": npy("{'descr': '<f4', 'shape': ("),
    "a header of 4 GB": npy(said("'<f4'", "(2, 2)"), b"\0" * 16, 2, 2**32 - 1),
    "a deep header": npy("(" * 5000),
    "code": npy("__import__('os').mkdir('EXECUTED')"),
    "another version": npy(said("'<f4'", "(2, 2)"), b"\0" * 16, 2)[:6] + b"\x09" + b"\0" * 80,
}


def inside(data: bytes, packing: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive that holds some bytes as array ``x``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        archive.writestr("x.npy", data)
    return buffer.getvalue()


@pytest.mark.parametrize("packing", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("header", list(HEADERS))
def test_headers_of_npy(tmp_path, monkeypatch, memory, header, packing):
    monkeypatch.chdir(tmp_path)
    name = "a.npy" if packing is None else "a.npz"
    data = HEADERS[header] if packing is None else inside(HEADERS[header], packing)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SnipError, match=r"a\.np"):
        open_features(tmp_path / name)
    if header != "Fortran":  # a table of vectors may be
        with pytest.raises(SnipError, match=r"a\.np"):
            read_vectors(tmp_path / name, None)
    if packing is None:
        with pytest.raises(SnipError, match=r"a\.npy"):
            open_mask(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def bomb(size: int) -> bytes:
    """Return an archive of zeros: ``size`` bytes from a thousandth of them."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy(said("'<f4'", f"({size // 64}, 16)")))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def patched(data: bytes, place: int, value: int, width: int) -> bytes:
    """Return an archive whose directory says something else of its member."""
    at = data.rfind(b"PK\1\2") + place
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


ARCHIVES = {
    "a bomb": (lambda: bomb(1 << 28), "floats do not pack like that"),
    "a size that lies": (lambda: patched(inside(npy(said("'<f4'", "(268435456, 16)"))), 24,
                                         2**32 - 2, 4), "says another size than it has"),
    "encrypted": (lambda: patched(inside(npy(said("'<f4'", "(1, 1)"), b"\0" * 4)), 8, 1, 2),
                  "encrypted"),
    "another packing": (lambda: patched(inside(npy(said("'<f4'", "(1, 1)"), b"\0" * 4)), 10, 99,
                                        2), "not an .npz archive"),
    "no archive": (lambda: b"PK\3\4" + bytes(100), "a.npz"),
    "no array": (lambda: b"PK\5\6" + bytes(18), "a.npz"),
}  # fmt: skip


@pytest.mark.parametrize("archive", list(ARCHIVES))
def test_archives(tmp_path, memory, archive):
    make, why = ARCHIVES[archive]
    (tmp_path / "a.npz").write_bytes(make())
    for read in (open_features, lambda path: read_vectors(path, None)):
        with pytest.raises(SnipError, match=r"a\.npz") as refused:
            read(tmp_path / "a.npz")
        assert why in str(refused.value) or read is not open_features


def test_an_archive_of_many_and_of_nested_names_is_asked_about(tmp_path):
    np.savez(tmp_path / "a.npz", **{"../../etc/x": ROWS, "y": ROWS})
    with pytest.raises(InputError, match="several arrays; choose one with --array"):
        open_features(tmp_path / "a.npz")
    assert open_features(tmp_path / "a.npz", array="../../etc/x").rows == 300


def test_zeros_of_a_megabyte_are_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1 << 16, 16), np.float32))
    assert open_features(tmp_path / "a.npz").read(0, 1 << 16).sum() == 0


def test_a_csv_that_is_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"url,\xff\xd0\n1,2\n")
    with pytest.raises(SnipError, match=r"a\.csv: not a CSV"):
        open_metadata(str(tmp_path / "a.csv"))


# ---- folders of ours that someone changed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sound files of every kind."""
    folder = tmp_path_factory.mktemp("corpus")
    fuzz_readers.make_corpus(folder)
    return folder


@pytest.fixture
def ours(corpus, tmp_path):
    """A copy that may be changed."""
    import shutil

    return shutil.copytree(corpus, tmp_path / "x")


def edit(folder, change):
    body = json.loads((folder / MANIFEST).read_text())
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body))


@pytest.mark.parametrize("name", ["dim_in", "hidden", "dim", "heads"])
@pytest.mark.parametrize("value", [2**31, 2**70, -1, "16", [[]], True, None, [2**70], [4, -1]])
def test_an_encoder_that_says_other_widths(ours, memory, name, value):
    edit(ours / "encoder", lambda body: body["encoder"].update({name: value}))
    with pytest.raises(SnipError, match=r"expected the widths|do not fit"):
        Encoder.load(ours / "encoder", "cpu")


@pytest.mark.parametrize("seed", range(24))
def test_weights_that_are_pickles_or_damaged(tmp_path, monkeypatch, memory, seed):
    """Vouched for by the manifest, too."""
    monkeypatch.chdir(tmp_path)
    Encoder(Network(16, 8, 4)).save(tmp_path / "encoder", {})
    path = tmp_path / "encoder" / WEIGHTS
    fuzz_readers.change_weights(path, np.random.default_rng(seed))
    fuzz_readers.vouch(path.parent / MANIFEST, path)
    try:
        Encoder.load(path.parent, "cpu")
    except SnipError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert not (tmp_path / "EXECUTED").exists()


def test_a_quantiser_that_says_it_is_huge(ours, memory):
    """Any eight bytes that are a length, made 2^36."""
    path = ours / QUANTISER
    whole = (ours / "q.faiss").read_bytes()
    for at in range(0, min(len(whole), 400)):
        path.write_bytes(whole[:at] + (2**36).to_bytes(8, "little") + whole[at + 8 :])
        try:
            read_quantiser(path)
        except SnipError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("name", ["codes", "ids", "sizes", "bad", "self_adc"])
@pytest.mark.parametrize("change", [
    lambda a: a.astype(np.complex128), lambda a: a.astype(np.float64)[None], lambda a: a[..., None],
    lambda a: np.append(a, a.dtype.type(0)), None,
])  # fmt: skip
def test_an_index_with_other_arrays(ours, name, change):
    path = ours / "index" / "lists_00000.npz"
    with np.load(path) as held:
        arrays = dict(held)
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    np.savez(path, **arrays)
    index = Index(ours / "index")
    with pytest.raises(SnipError, match=r"lists_00000\.npz"):
        index.lists()
    with pytest.raises(SnipError, match=r"lists_00000\.npz"):
        index.shard(0, mapped=True)


def test_an_index_of_objects_runs_nothing(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ours / "index" / "lists_00000.npz"
    np.savez(path, codes=np.array([fuzz_readers.Evil()], object))
    for mapped in (False, True):
        with pytest.raises(SnipError, match=r"lists_00000\.npz"):
            load_shard(path, mapped=mapped)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("entry", ["rows", "shards", "request", "format", "outputs"])
@pytest.mark.parametrize("value", [None, "x", [1], {"x": 1}, -1, 2**70, 0.5])
def test_a_manifest_of_an_index_with_wrong_types(ours, entry, value):
    edit(ours / "index", lambda body: body.update({entry: value}))
    try:
        Index(ours / "index")
    except SnipError as error:
        assert str(ours / "index") in str(error)  # noqa: PT017
    else:
        assert (entry, value) in [("outputs", {"x": 1}), ("format", -1)]


SETTINGS = [
    ("threshold", [1]), ("threshold", "x"), ("threshold", None), ("key", {"x": 1}), ("key", 3),
    ("keep", [[]]), ("grouping", 0.5), ("seed", "x"), ("metadata", [None]), ("features", {}),
    ("features", [[]]), ("recall", True), ("clusters", 0.5), ("epsilon", [[1]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_settings_of_an_out_with_wrong_types(ours, name, value):
    """Whoever reads the manifest says so, in one line."""
    edit(ours / "out", lambda body: body["settings"].update({name: value}))
    out = str(ours / "out")
    for use in (
        lambda: dedup(out, threshold=0.97, out=str(ours / "new")),
        lambda: top.run(Top(out=out)),
    ):
        with pytest.raises(SnipError, match=f"damaged: its setting '{name}' is") as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", [["x"], None, 3, {}])
def test_a_shard_whose_name_is_none(ours, name):
    edit(ours / "out", lambda body: body["shards"][0].update(name=name))
    with pytest.raises(SnipError, match="damaged: shard 0 is"):
        dedup(str(ours / "out"), threshold=0.97, out=str(ours / "new"))


@pytest.mark.parametrize("shards", [[], [{"name": "a.npy", "rows": 96}] * 2])
def test_a_manifest_with_other_shards_than_were_asked_for(ours, shards):
    edit(ours / "out", lambda body: body.update(shards=shards))
    with pytest.raises(SnipError, match=r"damaged|as snip wrote"):
        dedup(str(ours / "out"), threshold=0.97, out=str(ours / "new"))


def test_json_that_is_deep(tmp_path):
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(SnipError, match="expected JSON"):
        read_manifest(tmp_path, "dedup")


TABLES = {
    "a column missing": lambda table: table.drop_columns(["representative"]),
    "a column twice": lambda table: table.append_column("row", table["row"]),
    "texts": lambda table: table.set_column(0, table.column_names[0], pa.array(["x"] * len(table))),
    "no row like that": lambda table: table.set_column(
        table.column_names.index("row"), "row", pa.array(np.full(len(table), 2**40))
    ),
}


@pytest.mark.parametrize("change", list(TABLES))
def test_groups_that_were_changed(ours, change, monkeypatch, capsys):
    path = ours / "out" / "groups.parquet"
    pq.write_table(TABLES[change](pq.read_table(path)), path)
    monkeypatch.chdir(ours)
    with pytest.raises(SystemExit) as left:
        cli.main(["diff", "out", "out2"])
    if change != "no row like that":
        assert left.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) <= 1


@pytest.mark.parametrize("ends", [np.int64(2**40), np.int64(-5)])
def test_a_forest_with_rows_that_there_are_not(ours, ends):
    path = ours / "out" / "forest.parquet"
    held = pq.read_table(path)
    pq.write_table(held.set_column(0, "a", pa.array(np.full(len(held), ends))), path)
    with pytest.raises(SnipError, match=r"forest\.parquet: damaged"):
        dedup(str(ours / "out"), threshold=0.97, out=str(ours / "new"))


def test_a_short_fuzz():
    """Every reader, some cases; the seed is fixed, so that a failure stays one."""
    found = fuzz_readers.fuzz(list(fuzz_readers.READERS), seed=7, minutes=1, batch=12, most=12)
    assert all(len(outcomes) == 12 for outcomes in found.values())
    assert fuzz_readers.broken(found) == []


def test_the_fuzz_sees_what_breaks(monkeypatch):
    """It counts exceptions, memory, and a process that dies."""
    breaks = {
        "error": lambda folder: {}["x"],
        "memory": lambda folder: np.zeros(1 << 30, np.uint8).sum(),
        "signal": lambda folder: os.kill(os.getpid(), 9),
    }
    for name, read in breaks.items():
        monkeypatch.setitem(fuzz_readers.READERS, name, fuzz_readers.Reader("a.npy", read))
    monkeypatch.setattr(fuzz_readers, "make_corpus", lambda folder: np.save(folder / "a.npy", ROWS))
    found = fuzz_readers.fuzz(list(breaks), seed=0, minutes=1, batch=2, most=2)
    assert [len(outcomes) for outcomes in found.values()] == [2, 2, 2]
    assert all(text.startswith("broke") for cases in found.values() for _, text in cases)
