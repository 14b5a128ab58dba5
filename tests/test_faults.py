"""Faults of disks and of people: nothing half-read or half-written is taken for whole."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup import cli
from snipdedup.auditing import audit
from snipdedup.deduplication import run as dedup_run
from snipdedup.encoder import compress
from snipdedup.encoder.network import Encoder, Network
from snipdedup.errors import InputError
from snipdedup.evaluation import evaluate
from snipdedup.features import formats
from snipdedup.features.shards import open_features
from snipdedup.index import build as index
from snipdedup.metadata import filter
from snipdedup.storage import locks, out_folder
from snipdedup.storage.out_folder import MANIFEST

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
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_read_error_in_the_middle_of_a_shard(inputs, monkeypatch, capsys, command):
    whole = formats.NpyShard._read_range

    def fail(self, start, rows):
        if self.path.name == "b.npy" and start + len(rows) > 500:
            raise OSError(errno.EIO, "Input/output error", str(self.path))
        whole(self, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(formats.NpyShard, "_read_range", fail)
        assert run(*COMMANDS[command]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "b.npy" in said
    assert "Input/output error" in said
    assert not (inputs / "out" / MANIFEST).exists()
    assert run(*COMMANDS[command]) == 0
    assert run(*COMMANDS[command][:-1], "alone") == 0
    assert results(inputs / "out") == results(inputs / "alone")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_shard_that_changes_while_it_is_read(inputs, monkeypatch, capsys, command):
    module, name = {
        "dedup": (dedup_run, "search_pairs"),
        "compress": (compress, "compress_shards"),
        "index": (index, "write_codes"),
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
        "dedup": (dedup_run, "decide_job"),
        "compress": (out_folder, "publish"),
        "index": (index, "finish_index"),
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
        if path.name == locks.REQUEST:
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
        (inputs / "out" / MANIFEST).unlink(missing_ok=True)
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


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_read_error_as_the_system_says_it_names_the_file(inputs, monkeypatch, capsys, command):
    """/proc/self/mem has no page 0; reading it is an input/output error."""
    opened, fill = Path.open, formats.NpyShard._read_range

    def fill_broken(self, start, rows):
        if self.path.name != "b.npy":
            return fill(self, start, rows)
        with monkeypatch.context() as patch:
            patch.setattr(self, "data", -start * self.dim * self.stored.itemsize)
            patch.setattr(Path, "open", lambda path, *how: opened(Path("/proc/self/mem"), *how))
            return fill(self, start, rows)

    monkeypatch.setattr(formats.NpyShard, "_read_range", fill_broken)
    assert run(*COMMANDS[command]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "snip: img/b.npy: Input/output error"
    assert not (inputs / "out" / MANIFEST).exists()


def test_rows_of_a_file_that_became_shorter_are_not_touched(inputs):
    """They are mapped: to touch them would end the process."""
    features = open_features("img")
    some = np.array([0, 1800, 2999])
    assert np.array_equal(features.gather(some), ROWS[some])
    with (inputs / "img" / "b.npy").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(InputError, match=r"b\.npy: became shorter while it was read"):
        features.gather(some)
    with pytest.raises(InputError, match=r"b\.npy: expected rows .*the file ended early"):
        features.read(0, 3000)


def test_a_shard_that_is_cut_between_the_scan_and_the_proof(inputs, monkeypatch, capsys):
    decide = dedup_run.decide_job

    def cut(*given):
        os.truncate(inputs / "img" / "b.npy", 4096)
        return decide(*given)

    monkeypatch.setattr(dedup_run, "decide_job", cut)
    assert run(*COMMANDS["dedup"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("snip: img/b.npy: ")
    assert said.endswith(" while it was read; run it again")
    assert not (inputs / "out" / MANIFEST).exists()


# What is read, how it is changed while the command runs, and where in it that happens.
CHANGES = {
    "dedup: metadata": ("dedup img --metadata meta --out out", "meta/b.parquet",
                        dedup_run, "write_files"),
    "dedup: reference": ("dedup img --reference other --out out", "other/c.npy",
                         dedup_run, "write_files"),
    "dedup: captions": ("dedup img --text_features txt --out out", "txt/d.npy",
                        dedup_run, "write_files"),
    "filter: metadata": ("filter meta --is_dup clean --out out", "meta/a.parquet",
                         filter, "write_rows"),
    "filter: features": ("filter meta --is_dup clean --embeddings img --out out", "img/a.npy",
                         filter, "write_rows"),
    "filter: mask": ("filter meta --is_dup clean/is_dup.npy --out out", "clean/is_dup.npy",
                     filter, "write_rows"),
    "filter: keys": ("filter meta --is_dup clean --on uid --keys keys --out out", "keys/a.parquet",
                     filter, "write_rows"),
    "eval": ("eval img --queries 50 --out out", "img/b.npy", evaluate, "evaluate"),
    "audit": ("audit clean img", "img/b.npy", audit, "audit"),
    "audit: metadata": ("audit clean img", "meta/b.parquet", audit, "audit"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CHANGES))
def test_inputs_that_change_while_they_are_read(inputs, monkeypatch, capsys, case):
    words, name, module, function = CHANGES[case]
    (inputs / "other").mkdir()
    (inputs / "txt").mkdir()
    np.save(inputs / "other" / "c.npy", ROWS[100:200])
    np.save(inputs / "txt" / "d.npy", ROWS)
    for folder in ("meta", "keys"):
        (inputs / folder).mkdir()
        for file, rows in (("a", range(1700)), ("b", range(1700, 3000))):
            table = pa.table({"uid": [f"u{row}" for row in rows]})
            pq.write_table(table, inputs / folder / f"{file}.parquet")
    assert run("dedup", "img", "--metadata", "meta", "--out", "clean") == 0
    capsys.readouterr()
    original = getattr(module, function)

    def change(*given, **named):
        found = {} if function == "evaluate" else original(*given, **named)
        data = (inputs / name).read_bytes()
        (inputs / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(inputs / name, ns=(1, 1))
        return found

    monkeypatch.setattr(module, function, change)
    assert run(*words.split()) == 1
    shown = capsys.readouterr()
    said = shown.err.strip().splitlines()[-1]
    assert said.startswith("snip: ")
    assert said.endswith(f"{name}: changed while it was read; run it again")
    assert shown.out == ""
    left = list((inputs / "out").iterdir()) if (inputs / "out").exists() else []
    # the search does not depend on metadata, and is kept
    assert [path.name for path in left] == ["work"] * (case == "dedup: metadata")


def without_rights():
    """Let root read and write only what its files' modes allow (CAP_DAC_OVERRIDE, _READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: gone at the next exec


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_no_permission(inputs, snip):
    """In processes of their own, as anyone but root."""
    (inputs / "closed").mkdir(mode=0o555)
    (inputs / "meta.csv").write_text("uid\n" + "x\n" * 3000)
    (inputs / "meta.csv").chmod(0)
    for words, said in (
        ("dedup img --out closed/out", "cannot write closed/out"),
        ("compress img --encoder enc --out closed/out", "cannot write closed/out"),
        ("dedup img --metadata meta.csv --out out", "meta.csv"),
    ):
        done = snip(*words.split(), status=1, cwd=inputs, preexec_fn=without_rights)
        assert len(done.stderr.strip().splitlines()) == 1
        assert said in done.stderr
        assert "ermission denied" in done.stderr
    (inputs / "img" / "b.npy").chmod(0)
    done = snip("dedup", "img", "--out", "out", status=1, cwd=inputs, preexec_fn=without_rights)
    assert done.stderr == "snip: img/b.npy: Permission denied\n"
    assert not (inputs / "out").exists()
