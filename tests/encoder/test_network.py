"""The network against its formula in numpy, its folder against tampering, compress end to end."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from snipdedup import config
from snipdedup.encoder import compress as room
from snipdedup.encoder.network import Encoder, Network
from snipdedup.errors import InputError, SnipError
from snipdedup.features.formats import open_shard
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.storage import atomic, out_folder
from snipdedup.storage.out_folder import read_manifest

DIM_IN, HIDDEN, DIM = 24, 40, 8


def random_network() -> Network:
    network = Network(DIM_IN, HIDDEN, DIM, [4])
    generator = torch.Generator().manual_seed(5)
    for weights in network.parameters():
        weights.data.normal_(generator=generator)
    return network


@pytest.fixture
def folder(tmp_path):
    Encoder(random_network()).save(tmp_path / "encoder", {"command": "test"})
    return tmp_path / "encoder"


@pytest.fixture
def shards(tmp_path):
    """Three shards whose borders fall inside blocks, one of them empty."""
    rng = np.random.default_rng(1)
    (tmp_path / "img_emb").mkdir()
    parts = [rng.normal(size=(n, DIM_IN)).astype(np.float16) for n in (700, 0, 1800, 513)]
    for number, part in enumerate(parts):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part)
    return tmp_path / "img_emb", np.concatenate(parts)


@pytest.fixture
def single(tmp_path):
    """A folder for one file more: outputs may not lie beside an input."""
    (tmp_path / "single").mkdir()
    return tmp_path / "single"


def formula(network: Network, rows: np.ndarray, output: int = 0) -> np.ndarray:
    weights = {k: v.double().numpy() for k, v in network.state_dict().items()}
    x = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    z = x @ weights["inner.weight"].T + weights["inner.bias"]
    gelu = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
    linear, bias, outer = (
        weights[f"outputs.{output}.{name}"]
        for name in ("linear.weight", "linear.bias", "outer.weight")
    )
    y = x @ linear.T + bias + gelu @ outer.T
    return y / np.linalg.norm(y, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_encode_is_the_formula(dtype):
    network = random_network()
    rows = (7 * np.random.default_rng(0).normal(size=(300, DIM_IN))).astype(dtype)
    found = Encoder(network).encode(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, formula(network, rows), atol=2e-6)
    head = Encoder(network).of_width(4).encode(rows)
    np.testing.assert_allclose(head, formula(network, rows, 1), atol=2e-6)


def test_a_code_takes_the_narrowest_output_with_two_bits_a_dimension():
    encoder = Encoder(Network(24, 8, 16, [8, 4]))
    assert [encoder.for_codes(m).dim for m in (1, 2, 4, 8)] == [4, 8, 16, 16]
    assert [encoder.for_codes(m, 4).dim for m in (1, 2, 4, 8)] == [4, 4, 8, 16]
    assert encoder.for_codes(3).dim == 16  # divides none: the index refuses it
    assert encoder.of_width(8).dim == 8
    assert encoder.of_width(5).dim == 16


def test_descriptors_do_not_depend_on_chunks_or_threads():
    encoder = Encoder(random_network())
    rows = np.random.default_rng(0).normal(size=(3000, DIM_IN)).astype(np.float32)
    whole = encoder.encode(rows, first=70)
    cuts = [0, 1, 17, 954, 955, 2003, 3000]
    parts = [encoder.encode(rows[a:b], first=70 + a) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert np.array_equal(encoder.encode(rows, first=70), whole)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_encode_refuses_other_widths_and_gives_bad_rows_zeros():
    encoder = Encoder(random_network())
    with pytest.raises(SnipError, match=r"expects rows 24 wide, found an array of \(3, 25\)"):
        encoder.encode(np.ones((3, 25), np.float32))
    rows = np.ones((4, DIM_IN), np.float32)
    rows[1], rows[2, 3] = 0, np.nan
    found = encoder.encode(rows)
    assert not found[1:3].any()
    assert found[[0, 3]].any(axis=1).all()
    assert encoder.encode(rows[:0]).shape == (0, DIM)


def test_a_rotation_keeps_every_product():
    network = random_network()
    rows = np.random.default_rng(0).normal(size=(50, DIM_IN))
    before = Encoder(network).encode(rows)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64))[0].float()
    network.outputs[0].rotate(rotation)
    after = Encoder(network).encode(rows)
    np.testing.assert_allclose(after, before @ rotation.numpy().T, atol=1e-5)
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)


def test_save_and_load_give_the_same_encoder(folder, tmp_path):
    rows = np.random.default_rng(0).normal(size=(100, DIM_IN))
    loaded = Encoder.load(folder, device="cpu")
    assert (loaded.dim_in, loaded.dim, loaded.device) == (DIM_IN, DIM, "cpu")
    assert np.array_equal(loaded.encode(rows), Encoder(random_network()).encode(rows))
    loaded.save(tmp_path / "again", {})
    assert atomic.sha256(tmp_path / "again" / "weights.pt") == atomic.sha256(folder / "weights.pt")


def reseal(folder, change=None) -> None:
    """Write the manifest anew, as someone who tampers would."""
    manifest = json.loads((folder / "snip.json").read_text())
    manifest["outputs"]["weights.pt"]["sha256"] = atomic.sha256(folder / "weights.pt")
    if change:
        change(manifest)
    (folder / "snip.json").write_text(json.dumps(manifest))


def test_changed_weights_are_refused(folder):
    data = bytearray((folder / "weights.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "weights.pt").write_bytes(bytes(data))
    with pytest.raises(SnipError, match=r"weights.pt: changed since snip.json was written"):
        Encoder.load(folder)


class Bomb:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("thing", [Bomb(), random_network()])
def test_a_pickled_module_is_refused_even_if_the_manifest_vouches_for_it(
    folder, how, thing, capsys
):
    how(thing, folder / "weights.pt")
    reseal(folder)
    with pytest.raises(SnipError, match="pickled modules are not read"):
        Encoder.load(folder)
    assert "must not run" not in capsys.readouterr().out


def test_a_pickled_file_as_upstream_published_is_refused(tmp_path, shards):
    torch.save(random_network(), tmp_path / "mlp_1024_128_gelu.pt")
    with pytest.raises(SnipError, match=r"gelu.pt: expected an encoder folder .*snip train"):
        compress(shards[0], tmp_path / "mlp_1024_128_gelu.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["encoder"].update(dim=9), "layers do not fit snip.json"),
        (lambda m: m["encoder"].update(dim="9"), "layers do not fit snip.json"),
        (lambda m: m["encoder"].update(layout=1), "expected an encoder of layout 2, found 1"),
        (lambda m: m.pop("encoder"), "expected an encoder of layout 2, found None"),
        (lambda m: m.pop("outputs"), "names no weights.pt"),
        (lambda m: m.update(kind="index"), "expected a manifest of kind 'encoder', found 'index'"),
        (lambda m: m.update(format=99), "written by a newer snipdedup"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, change, message):
    reseal(folder, change)
    with pytest.raises(SnipError, match=message):
        Encoder.load(folder)


def test_missing_files_are_refused(folder, tmp_path):
    (folder / "weights.pt").unlink()
    with pytest.raises(SnipError, match=r"weights.pt: no such file"):
        Encoder.load(folder)
    with pytest.raises(SnipError, match="expected a finished encoder folder"):
        Encoder.load(tmp_path / "nowhere")


def compress(features, folder, out, **given) -> str:
    options = config.Compress(features=str(features), encoder=str(folder), out=str(out), **given)
    return str(room.run(options))


def test_compress_writes_what_encode_gives_shard_for_shard(folder, shards, tmp_path, snip):
    source, rows = shards
    out = tmp_path / "out"
    said = snip("compress", source, "--encoder", folder, "--out", out).stdout
    assert said.startswith("3,013 rows in 4 shards: 24 wide to 8")
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"img_emb_{n}.npy" for n in range(4)),
        "snip.json",
    ]
    written = [np.load(out / f"img_emb_{n}.npy") for n in range(4)]
    assert [part.shape for part in written] == [(700, 8), (0, 8), (1800, 8), (513, 8)]
    expected = Encoder.load(folder).encode(rows).astype(np.float16)
    assert np.array_equal(np.concatenate(written), expected)
    manifest = read_manifest(out, "descriptors")
    assert manifest["encoder_sha256"] == atomic.sha256(folder / "weights.pt")
    assert [s["name"] for s in manifest["shards"]] == [f"img_emb_{n}.npy" for n in range(4)]
    assert manifest["counts"] == {"rows": 3013, "dim": 8}


def test_the_same_bits_from_one_file_and_any_threads(folder, shards, single, tmp_path):
    source, rows = shards
    np.save(single / "whole.npy", rows)
    compress(source, folder, tmp_path / "a", threads=1, dtype="float32")
    compress(single / "whole.npy", folder, tmp_path / "b", threads=3, dtype="float32")
    parts = [np.load(tmp_path / "a" / f"img_emb_{n}.npy") for n in range(4)]
    assert np.array_equal(np.concatenate(parts), np.load(tmp_path / "b" / "whole.npy"))


def test_parquet_in_npy_out(folder, single, tmp_path):
    rows = np.random.default_rng(2).normal(size=(10, DIM_IN)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(rows.ravel(), DIM_IN)
    pq.write_table(pa.table({"embedding": column}), single / "part_3.parquet")
    compress(single / "part_3.parquet", folder, tmp_path / "out", dtype="float32")
    found = np.load(tmp_path / "out" / "part_3.npy")
    assert np.array_equal(found, Encoder.load(folder).encode(rows))


def test_a_stopped_run_goes_on_where_it_was(folder, shards, tmp_path, monkeypatch):
    source, out = shards[0], tmp_path / "out"
    compress(source, folder, tmp_path / "straight")
    compress_shard, written = room.compress_shard, []

    def stops(features, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return compress_shard(features, number, *rest)

    def counts(features, number, *rest):
        written.append(number)
        return compress_shard(features, number, *rest)

    monkeypatch.setattr(room, "compress_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        compress(source, folder, out)
    assert not (out / "snip.json").exists()
    with pytest.raises(SnipError, match=r"stopped run with other dtype"):
        compress(source, folder, out, dtype="float32")
    monkeypatch.setattr(room, "compress_shard", counts)
    compress(source, folder, out)
    assert written == [2, 3]
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "straight").iterdir()}
    for path in (tmp_path / "straight").glob("*.npy"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    crcs = [read_manifest(o, "descriptors")["shards"] for o in (out, tmp_path / "straight")]
    assert crcs[0] == crcs[1]


def test_a_finished_run_is_not_redone_or_mixed(folder, shards, single, tmp_path):
    source, out = shards[0], tmp_path / "out"
    compress(source, folder, out)
    assert "finished already" in compress(source, folder, out, threads=1)
    with pytest.raises(SnipError, match=r"finished run with other dtype .*--overwrite"):
        compress(source, folder, out, dtype="float32")
    np.save(single / "other.npy", shards[1][:5])
    compress(single / "other.npy", folder, out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {"other.npy", "snip.json"}


def interrupted(*_):
    raise KeyboardInterrupt


def test_overwriting_a_stopped_run_leaves_nothing_of_it(
    folder, shards, single, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(out_folder, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(shards[0], folder, out)
    assert (out / "work" / "files" / "img_emb_3.npy").is_file()
    assert not (out / "img_emb_3.npy").exists()
    np.save(single / "other.npy", shards[1][:5])
    compress(single / "other.npy", folder, out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {"other.npy", "snip.json"}


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "NaN"), (np.inf, "infinity"), (0, "zeros only")]
)
def test_a_bad_row_is_refused_by_file_and_row(folder, shards, tmp_path, value, what):
    source, out = shards[0], tmp_path / "out"
    rows = np.load(source / "img_emb_2.npy")
    rows[1033] = value
    np.save(source / "img_emb_2.npy", rows)
    with pytest.raises(SnipError, match=rf"img_emb_2.npy row 1033 \({what}\)"):
        compress(source, folder, out)
    assert not out.exists()


def test_a_bad_row_leaves_an_older_result_alone(folder, shards, tmp_path):
    source, out = shards[0], tmp_path / "out"
    compress(source, folder, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    rows = np.load(source / "img_emb_3.npy")
    rows[512] = 0
    np.save(source / "img_emb_3.npy", rows)
    with pytest.raises(InputError, match=r"img_emb_3.npy row 512 \(zeros only\)"):
        compress(source, folder, out, overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_rewritten_shards_are_another_input_but_a_new_date_is_not(folder, shards, tmp_path):
    source, out = shards[0], tmp_path / "out"
    compress(source, folder, out)
    for path in source.iterdir():
        os.utime(path, ns=(0, 1))
        checksum = checksum_text(shard_checksum(open_shard(path)))
        held = read_manifest(out, "descriptors")["shards"]
        assert checksum in [s["checksum"] for s in held if s["name"] == path.name]
    assert "finished already" in compress(source, folder, out)
    np.save(source / "img_emb_0.npy", 2 * np.load(source / "img_emb_0.npy"))
    with pytest.raises(SnipError, match="finished run with other features_changed"):
        compress(source, folder, out)


def test_a_stopped_run_does_not_go_on_with_rewritten_shards(folder, shards, tmp_path, monkeypatch):
    source, out = shards[0], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(out_folder, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(source, folder, out)
    np.save(source / "img_emb_0.npy", 2 * np.load(source / "img_emb_0.npy"))
    with pytest.raises(SnipError, match="stopped run with other features_changed"):
        compress(source, folder, out)


def test_wrong_widths_places_and_names_are_refused_before_anything_is_written(
    folder, shards, tmp_path
):
    np.save(tmp_path / "wide.npy", np.ones((5, DIM_IN + 1), np.float32))
    with pytest.raises(SnipError, match=r"wide.npy: rows are 25 wide, --encoder .* expects 24"):
        compress(tmp_path / "wide.npy", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SnipError, match="lies in the input folder"):
        compress(shards[0], folder, shards[0] / "out")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "same.npy", shards[1][:3])
    with pytest.raises(SnipError, match=r"would both be written as same.npy"):
        compress(tmp_path / "[ab]" / "*.npy", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
