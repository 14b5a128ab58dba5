"""Faults of disks and of people: nothing half-read or half-written is taken for whole."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from snipdedup import cli
from snipdedup.chain import deduplicate
from snipdedup.ground import formats, store
from snipdedup.index import building as index
from snipdedup.train import encoder
from snipdedup.train.encoder import Encoder, Network

ROWS = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
ROWS[2000:] = ROWS[:1000] + 0.01 * ROWS[1000:2000]
TABLES = ("is_dup.npy", "forest.parquet", "groups.parquet")


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Two shards and an encoder in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    np.save(tmp_path / "img" / "a.npy", ROWS[:1700])
    np.save(tmp_path / "img" / "b.npy", ROWS[1700:])
    Encoder(Network(16, 8, 4)).save(tmp_path / "enc", {})
    return tmp_path


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return left.value.code or 0


COMMANDS = {
    "dedup": ("dedup", "img", "--out", "out"),
    "compress": ("compress", "img", "--encoder", "enc", "--out", "out"),
    "index": ("index", "img", "--m", "4", "--nlist", "8", "--out", "out"),
}


def results(folder):
    """Return the files of a finished OUT but its manifest, which holds times."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != store.MANIFEST]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_read_error_in_the_middle_of_a_shard(inputs, monkeypatch, capsys, command):
    whole = formats.NpyShard._fill

    def fail(self, start, rows):
        if self.path.name == "b.npy" and start + len(rows) > 500:
            raise OSError(errno.EIO, "Input/output error", str(self.path))
        whole(self, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(formats.NpyShard, "_fill", fail)
        assert run(*COMMANDS[command]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "b.npy" in said
    assert "Input/output error" in said
    assert not (inputs / "out" / store.MANIFEST).exists()
    assert run(*COMMANDS[command]) == 0
    assert run(*COMMANDS[command][:-1], "alone") == 0
    assert results(inputs / "out") == results(inputs / "alone")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_shard_that_changes_while_it_is_read(inputs, monkeypatch, capsys, command):
    module, name = {
        "dedup": (deduplicate, "search"),
        "compress": (encoder, "write_shards"),
        "index": (index, "write_shards"),
    }[command]
    original = getattr(module, name)

    def change(*given, **named):
        found = original(*given, **named)
        np.save(inputs / "img" / "b.npy", ROWS[1700:] + 1)
        return found

    monkeypatch.setattr(module, name, change)
    assert run(*COMMANDS[command]) == 1
    assert "b.npy: changed while it was read; run it again" in capsys.readouterr().err
    assert not (inputs / "out").exists()


def interrupted(monkeypatch, command):
    """Stop a run when all of its work is done, before it is put in place."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    module, name = {
        "dedup": (deduplicate, "decide_by"),
        "compress": (store, "publish"),
        "index": (index, "finish"),
    }[command]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert run(*COMMANDS[command]) == 130


@pytest.mark.parametrize("how", ["flipped", "truncated"])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_intermediates_that_are_damaged(inputs, monkeypatch, capsys, command, how):
    """Each is made anew, or the run is refused; what comes out is what always does."""
    assert run(*COMMANDS[command][:-1], "alone") == 0
    interrupted(monkeypatch, command)
    held = {p: p.read_bytes() for p in (inputs / "out" / "work").rglob("*") if p.is_file()}
    kinds = {".npy", ".npz", ".faiss", ".json"}
    damaged = [p for p in held if p.suffix in kinds and p.parent.name != "enc"]
    assert damaged
    for path in damaged:
        if path.name == store.REQUEST:
            continue
        for other, data in held.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(data)
        data = bytearray(held[path])
        if how == "flipped":
            data[-len(data) // 3] ^= 4
        else:
            del data[len(data) // 2 :]
        path.write_bytes(data)
        code = run(*COMMANDS[command])
        said = capsys.readouterr().err
        if code == 0:
            assert results(inputs / "out") == results(inputs / "alone"), path
        else:
            assert "damaged" in said, (path, said)
            assert path.name == "model.npz", said
        (inputs / "out" / store.MANIFEST).unlink(missing_ok=True)
        for name in results(inputs / "out"):
            (inputs / "out" / name).unlink()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_disk_that_is_full(inputs, monkeypatch, capsys, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(*COMMANDS[command]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("snip: cannot write out/")
    assert "No space left on device" in said[-1]
    assert run(*COMMANDS[command]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(inputs, capsys):
    (inputs / "closed").mkdir(mode=0o555)
    assert run("dedup", "img", "--out", "closed/out") == 1
    assert "cannot write closed/out" in capsys.readouterr().err
