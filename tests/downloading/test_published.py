"""Folders that were published: proved by their own manifest, and usable as they land."""

from __future__ import annotations

import hashlib
import json
import shutil

import fsspec
import numpy as np
import pytest
from servers import Hub, Server

from snipdedup import cli
from snipdedup.config import Download
from snipdedup.downloading import run as download
from snipdedup.errors import SnipError
from snipdedup.storage import atomic, remote


def snip(*words):
    assert cli.run([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder, an index and an OUT, as their author has them."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((700, 40)).astype(np.float32)
    rows[400:] = rows[rng.permutation(400)[:300]] + 0.1 * rng.standard_normal((300, 40))
    atomic.save_npy(folder / "features" / "img_emb_0.npy", rows)
    features = folder / "features"
    few = ("--steps", 20, "--batch", 64, "--hidden", 16, "--threads", 1)
    snip("train", features, "--out", folder / "encoder", "--dim", 16, *few)
    more = ("--encoder", folder / "encoder", "--nlist", 4, "--m", 4, "--threads", 1)
    snip("index", features, "--out", folder / "index", *more)
    snip("dedup", features, "--out", folder / "clean", "--threads", 1)
    return folder


@pytest.fixture
def server(made, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)
    with Server() as running:
        for path in made.rglob("*"):
            if path.is_file():
                running.files[f"v1/{path.relative_to(made)}"] = path.read_bytes()
        yield running


def fetch(source, out, **more):
    return str(download.run(Download(source=str(source), out=str(out), **more)))


def same(one, two):
    """Compare two folders, byte for byte."""
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
             for f in (one, two)]  # fmt: skip
    return files[0] == files[1]


@pytest.mark.parametrize(
    ("kind", "name"), [("web", "encoder"), ("hub", "index"), ("store", "clean"), ("path", "index")]
)
def test_a_published_folder_comes_as_its_author_made_it(
    server, made, tmp_path, monkeypatch, name, kind
):
    out = tmp_path / "out"
    with Hub(server) as api:
        monkeypatch.setenv("HF_ENDPOINT", api.url)
        api.tree = {n.removeprefix("v1/"): body for n, body in server.files.items()}
        if kind == "store":
            memory = fsspec.filesystem("memory")
            if memory.exists("/published"):
                memory.rm("/published", recursive=True)
            for path in (made / name).rglob("*"):
                if path.is_file():
                    with fsspec.open(f"memory://published/{path.relative_to(made)}", "wb") as file:
                        file.write(path.read_bytes())
        source = {
            "web": f"{server.url}/v1/{name}/",
            "hub": f"hf://datasets/someone/pictures/{name}",
            "store": f"memory://published/{name}",
            "path": str(made / name),
        }[kind]
        assert "each proved by sha256" in fetch(source, out)
        assert same(out, made / name)
        assert "finished already" in fetch(source, out)
        (out / next(iter(atomic.load_json(out / "snip.json")["outputs"]))).unlink()
        with pytest.raises(SnipError, match=r"holds a finished .* choose another folder"):
            fetch(source, out)
        fetch(source, out, overwrite=True)
        assert same(out, made / name)


def test_what_was_fetched_works(server, made, tmp_path):
    for name in ("encoder", "index", "clean"):
        fetch(f"{server.url}/v1/{name}", tmp_path / name)
    snip("compress", made / "features", "--encoder", tmp_path / "encoder", "--out", tmp_path / "a")
    snip("compress", made / "features", "--encoder", made / "encoder", "--out", tmp_path / "b")
    one, two = (np.load(tmp_path / name / "img_emb_0.npy") for name in "ab")
    np.testing.assert_array_equal(one, two)
    for name, folder in (("c", tmp_path), ("d", made)):
        snip("dedup", "--index", folder / "index", "--method", "adc", "--out", tmp_path / name)
    one, two = (np.load(tmp_path / name / "is_dup.npy") for name in "cd")
    np.testing.assert_array_equal(one, two)
    assert one.any()
    more = ("--threshold", 0.97, "--grouping", "components")
    snip("dedup", tmp_path / "clean", *more, "--out", tmp_path / "e")
    snip("dedup", made / "features", *more, "--out", tmp_path / "f")
    one, two = (np.load(tmp_path / name / "is_dup.npy") for name in "ef")
    np.testing.assert_array_equal(one, two)


def test_a_mask_is_found_in_a_published_out(server, made, tmp_path):
    atomic.save_parquet(tmp_path / "meta_0.parquet", table(700))
    server.files["meta_0.parquet"] = (tmp_path / "meta_0.parquet").read_bytes()
    fetch(f"{server.url}/meta_0.parquet", tmp_path / "out", is_dup=f"{server.url}/v1/clean")
    is_dup = np.load(made / "clean" / "is_dup.npy")
    import pyarrow.parquet as pq

    kept = pq.read_table(tmp_path / "out" / "meta_0.parquet")["key"].to_pylist()
    assert kept == np.flatnonzero(~is_dup).tolist()


def table(rows):
    import pyarrow as pa

    return pa.table({"key": range(rows)})


def test_a_damaged_or_lacking_file_is_refused(server, tmp_path):
    name = "v1/index/quantizer.faiss"
    server.faults[name] = "damage"
    with pytest.raises(SnipError, match="wrong checksum: expected sha256"):
        fetch(f"{server.url}/v1/index", tmp_path / "out")
    assert not (tmp_path / "out" / "snip.json").exists()
    server.faults.clear()
    body = server.files.pop(name)
    with pytest.raises(SnipError, match=r"quantizer\.faiss: 404"):
        fetch(f"{server.url}/v1/index", tmp_path / "out")
    server.files[name] = body
    fetch(f"{server.url}/v1/index", tmp_path / "out")
    assert server.names().count("v1/index/lists_00000.npz") <= 2  # what was whole stayed


def test_a_folder_that_is_published_anew_meanwhile_is_the_new_one(server, made, tmp_path):
    server.faults["v1/clean/metadata.txt"] = 500
    manifest = json.loads(server.files["v1/clean/snip.json"])
    for name in ("is_dup.npy", "metadata.txt"):
        server.files[f"v1/clean/{name}"] = b"an older version"
        sha = hashlib.sha256(b"an older version").hexdigest()
        manifest["outputs"][name] = {"size": 16, "sha256": sha}
    newest = server.files["v1/clean/snip.json"]
    server.files["v1/clean/snip.json"] = json.dumps(manifest).encode()
    with pytest.raises(SnipError, match="500"):
        fetch(f"{server.url}/v1/clean", tmp_path / "out", jobs=1)
    server.files["v1/clean/snip.json"] = newest
    server.files["v1/clean/is_dup.npy"] = (made / "clean" / "is_dup.npy").read_bytes()
    fetch(f"{server.url}/v1/clean", tmp_path / "out")
    assert same(made / "clean", tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\b", ""])
def test_a_manifest_may_not_lead_out_of_the_folder(server, tmp_path, name):
    manifest = {"kind": "encoder", "format": 1, "outputs": {name: {"size": 1, "sha256": "0"}}}
    server.files["v1/encoder/snip.json"] = json.dumps(manifest).encode()
    with pytest.raises(SnipError, match="which is not in the folder"):
        fetch(f"{server.url}/v1/encoder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "there is none; expected a pattern"),
        (b"<html>", "expected JSON"),
        (b"[1]", "found other JSON"),
        (b'{"kind": "encoder", "outputs": {}, "format": 99}', "written by a newer snipdedup"),
        (b'{"kind": "encoder", "outputs": {"a": 1}, "format": 1}', "size and sha256"),
    ],
)
def test_what_is_no_published_folder(server, tmp_path, body, message):
    if body is not None:
        server.files["v2/snip.json"] = body
    with pytest.raises(SnipError, match=message):
        fetch(f"{server.url}/v2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_one_is_not_replaced_by_another(server, made, tmp_path):
    shutil.copytree(made / "clean", tmp_path / "out")
    with pytest.raises(SnipError, match=r"holds a finished dedup, not what .*v1/encoder is now"):
        fetch(f"{server.url}/v1/encoder", tmp_path / "out")
    assert same(made / "clean", tmp_path / "out")
    with pytest.raises(SnipError, match="lies in the input folder"):
        fetch(made / "clean", made / "clean")


def test_a_published_download_is_known_again(server, made, tmp_path):
    atomic.save_parquet(tmp_path / "meta_0.parquet", table(10))
    server.files["meta_0.parquet"] = (tmp_path / "meta_0.parquet").read_bytes()
    fetch(f"{server.url}/meta_0.parquet", tmp_path / "mine")
    for path in (tmp_path / "mine").iterdir():
        server.files[f"set/{path.name}"] = path.read_bytes()
    fetch(f"{server.url}/set", tmp_path / "out")
    assert same(tmp_path / "mine", tmp_path / "out")
    assert "finished already" in fetch(f"{server.url}/set", tmp_path / "out")
    with pytest.raises(SnipError, match="holds a finished download, not what"):
        fetch(f"{server.url}/v1/clean", tmp_path / "out")
