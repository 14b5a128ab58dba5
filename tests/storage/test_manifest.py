"""A manifest describes a finished folder, and only that."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from snipdedup.errors import SnipError
from snipdedup.storage import atomic
from snipdedup.storage.manifest import FORMAT, read_manifest, write_manifest


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_manifest_round_trip(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "a.parquet").write_bytes(b"rows")
    (tmp_path / "is_dup.npy").write_bytes(b"mask" * 1000)
    outputs = [tmp_path / "metadata" / "a.parquet", tmp_path / "is_dup.npy"]
    write_manifest(tmp_path, "dedup", {"counts": {"rows": 2**40}}, outputs)
    manifest = read_manifest(tmp_path, "dedup")
    assert manifest["counts"] == {"rows": 2**40}
    assert manifest["outputs"]["is_dup.npy"] == {
        "size": 4000,
        "sha256": hashlib.sha256(b"mask" * 1000).hexdigest(),
    }
    assert sorted(manifest["outputs"]) == ["is_dup.npy", "metadata/a.parquet"]
    assert manifest["versions"]["numpy"] == np.__version__
    assert {"snipdedup", "python", "torch", "faiss-cpu", "pyarrow"} <= set(manifest["versions"])


def test_manifests_that_do_not_vouch(tmp_path):
    with pytest.raises(SnipError, match=r"expected a finished index folder with snip.json, found"):
        read_manifest(tmp_path, "index")
    write_manifest(tmp_path, "encoder", {}, [])
    with pytest.raises(SnipError, match="expected a manifest of kind 'index', found 'encoder'"):
        read_manifest(tmp_path, "index")
    for other in ([], {"kind": "index"}, {"name": "x"}):
        atomic.save_json(tmp_path / "snip.json", other)
        if other == {"kind": "index"}:
            assert read_manifest(tmp_path, "index") == other
            continue
        with pytest.raises(SnipError, match="expected a manifest of kind 'index', found None"):
            read_manifest(tmp_path, "index")
    atomic.save_json(tmp_path / "snip.json", {"kind": "index", "format": FORMAT + 1})
    with pytest.raises(SnipError, match="written by a newer snipdedup"):
        read_manifest(tmp_path, "index")


def test_the_manifest_is_plain_json(tmp_path):
    write_manifest(tmp_path, "filter", {"a": 1}, [])
    assert json.loads((tmp_path / "snip.json").read_text(encoding="utf-8"))["kind"] == "filter"
