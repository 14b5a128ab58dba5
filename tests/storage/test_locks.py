"""One run at a time into one folder: the second is refused, and a killed one locks nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup import cli
from snipdedup.encoder.network import Encoder, Network
from snipdedup.errors import SnipError
from snipdedup.storage import locks, out_folder
from snipdedup.storage.out_folder import read_manifest

ROWS = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
HOLD = """
import sys, time
from pathlib import Path
from snipdedup.storage import out_folder
out_folder.claim(Path(sys.argv[1]), sys.argv[2], {"mine": 1}, overwrite=False)
print("held", flush=True)
time.sleep(60)
"""


def status_of(words):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    return left.value.code or 0


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def inputs(tmp_path):
    """Features, metadata and a mask."""
    (tmp_path / "img").mkdir()
    np.save(tmp_path / "img" / "a.npy", ROWS)
    np.save(tmp_path / "mask.npy", np.arange(400) % 2 == 0)
    table = pa.table({"url": [f"http://x/{n}" for n in range(400)]})
    pq.write_table(table, tmp_path / "meta.parquet")
    Encoder(Network(16, 8, 4)).save(tmp_path / "enc", {})
    return tmp_path


@pytest.fixture
def at_work(tmp_path):
    """Let another thread, which is a run of its own, be at work in OUT."""
    claimed, end, running = threading.Event(), threading.Event(), []

    def work(kind):
        out_folder.claim(tmp_path / "out", kind, {"mine": 1}, overwrite=False)
        claimed.set()
        end.wait()

    def start(kind):
        running.append(threading.Thread(target=work, args=(kind,)))
        running[0].start()
        assert claimed.wait(30)

    yield start
    end.set()
    running[0].join()


COMMANDS = {
    "dedup": ["dedup", "img"],
    "train": ["train", "img", "--steps", "1", "--dim", "8"],
    "descriptors": ["compress", "img", "--encoder", "enc"],
    "index": ["index", "img", "--m", "4"],
    "filter": ["filter", "meta.parquet", "--is_dup", "mask.npy"],
    "download": ["download", "meta.parquet"],
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_second_run_is_refused_and_touches_nothing(
    inputs, at_work, monkeypatch, capsys, command, overwrite
):
    monkeypatch.chdir(inputs)
    at_work(command)
    before = contents(inputs)
    words = [*COMMANDS[command], "--out", "out", *(["--overwrite"] if overwrite else [])]
    assert status_of(words) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("snip: --out out is being written by another run"), said
    assert f"process {os.getpid()} on " in said
    assert contents(inputs) == before


def test_a_killed_run_locks_nothing(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    words = [sys.executable, "-c", HOLD, str(inputs / "out"), "dedup"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        assert status_of(["dedup", "img", "--out", "out"]) == 1
        assert f"being written by another run (process {child.pid} on " in capsys.readouterr().err
        child.kill()
    assert (inputs / "out" / "work" / locks.LOCK).is_file()
    assert status_of(["dedup", "img", "--out", "out", "--overwrite"]) == 0
    assert not (inputs / "out" / "work").exists()
    assert status_of(["dedup", "img", "--out", "out"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_runs_started_together(inputs, snip):
    """Whoever is first writes; the others are refused, or find it finished; never a mixture."""
    words = [sys.executable, "-m", "snipdedup", "dedup", "img", "--out", "out"]
    runs = [
        subprocess.Popen(words, cwd=inputs, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [run.communicate()[1].decode() for run in runs]
    codes = [run.returncode for run in runs]
    assert codes.count(0) >= 1, said
    assert set(codes) <= {0, 1}
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "is being written by another run" in text, text
    read_manifest(inputs / "out", "dedup")
    snip("dedup", "img", "--out", "alone", cwd=inputs)
    for name in ("is_dup.npy", "forest.parquet", "groups.parquet"):
        assert (inputs / "out" / name).read_bytes() == (inputs / "alone" / name).read_bytes()


# ---- the lock itself


def test_another_thread_is_another_run(tmp_path):
    found = []
    assert locks.acquire(tmp_path / "x" / "lock") is None
    assert locks.acquire(tmp_path / "x" / "lock") is None  # the same one again
    thread = threading.Thread(target=lambda: found.append(locks.acquire(tmp_path / "x" / "lock")))
    thread.start()
    thread.join()
    assert found[0].startswith("process ")
    locks.remove(tmp_path / "x" / "lock")
    assert not (tmp_path / "x" / "lock").exists()


def test_a_run_that_fails_gives_up_its_locks(tmp_path):
    @locks.released()
    def run():
        out_folder.claim(tmp_path / "out", "dedup", {}, overwrite=False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    with (tmp_path / "out" / "work" / locks.LOCK).open("ab") as file:
        assert locks.lock(file)


def test_a_lock_removed_while_it_was_awaited_is_taken_anew(tmp_path):
    """Many threads, one folder, taken and removed: never two at once."""
    path, inside, worst = tmp_path / "w" / "lock", [], []

    def work():
        done = 0
        while done < 20:
            if locks.acquire(path) is None:
                inside.append(1)
                worst.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
                locks.remove(path)
                done += 1
            time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(worst) == 80
    assert max(worst) == 1


def test_without_locks_in_the_system_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert out_folder.claim(tmp_path / "out", "dedup", {}, overwrite=False) == "new"


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SnipError, match="cannot write"):
        locks.lock_run(tmp_path / "out")
