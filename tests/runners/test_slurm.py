"""Processes that share a folder do together what one does alone, however they come and go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from processes import many_lists, results, until

from snipdedup.config import Dedup
from snipdedup.deduplication import run
from snipdedup.errors import SnipError, UsageError
from snipdedup.runners import slurm
from snipdedup.runners.local import Local
from snipdedup.runners.slurm import Share, ShareDone, Slurm, share_of
from snipdedup.storage import atomic, locks
from snipdedup.storage.out_folder import MANIFEST, read_manifest

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}


def asked(**settings):
    return Dedup(**{"features": "x", "out": "y", **settings})


# ---- which of how many


def test_a_share_by_flags():
    assert share_of(asked(num_tasks=7, task_index=6), {}) == Share(6, 7)
    assert share_of(asked(num_tasks=7, task_index=6), ARRAY) == Share(6, 7)
    assert share_of(asked(), {}) is None


def test_a_share_in_a_slurm_array():
    assert share_of(asked(), ARRAY) == Share(2, 3)
    steps = {**ARRAY, "SLURM_ARRAY_TASK_ID": "25", "SLURM_ARRAY_TASK_STEP": "10"}
    assert share_of(asked(), {**steps, "SLURM_ARRAY_TASK_MAX": "25"}) == Share(2, 3)
    assert share_of(asked(), {**ARRAY, "SLURM_ARRAY_TASK_ID": "x"}) is None
    for gap in ("7", "99"):  # --array=5,7,99
        with pytest.raises(UsageError, match="without gaps, such as --array=0-2"):
            share_of(asked(), {**ARRAY, "SLURM_ARRAY_TASK_ID": gap, "SLURM_ARRAY_TASK_MAX": "99"})


def test_an_array_is_no_matter_to_what_cannot_be_shared():
    for settings in ({"method": "exact"}, {"overwrite": True}, {"runner": "ray"}):
        assert share_of(asked(**settings), ARRAY) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": 7}, "give --task_index too"),
        ({"task_index": 0}, "give --num_tasks too"),
        ({"task_index": 0, "num_tasks": 1, "out": None}, "needs --out"),
    ],
)
def test_half_a_share_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        share_of(asked(**settings), {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task_index": 7}, "between 0 and 6, found 7"),
        ({"method": "exact"}, "--num_tasks goes with --method join, not exact"),
        ({"index": "i"}, "--num_tasks goes with --method join, not adc"),
        ({"runner": "ray"}, "two ways to share"),
        ({"overwrite": True}, "remove the folder first"),
    ],
)
def test_what_does_not_go_together(settings, said):
    with pytest.raises(UsageError, match=said):
        asked(**{"num_tasks": 7, "task_index": 0, **settings})


# ---- shares of tasks


def share_tasks(out, rank, world_size, done, count=12, begun=lambda: None, **more):
    """Do a share of some tasks as a process of its own does; return all that were yielded.

    ``begun`` is called before the first of them.
    """
    with locks.released():
        runner = Slurm(out, Share(rank, world_size), Local(1))
        begun()

        def do(number):
            done.append((rank, number))
            path = out / f"{number}.json"
            if not path.is_file():
                atomic.save_json(path, number)

        return list(runner.each(do, range(count), lambda n: out / f"{n}.json", **more))


def test_each_rank_does_its_share_and_waits_for_the_others(tmp_path):
    done, seen, both = [], {}, threading.Barrier(2)  # one that begins late checks the other's

    def work(rank, begun):
        seen[rank] = share_tasks(tmp_path, rank, 3, done, begun=begun)

    threads = [threading.Thread(target=work, args=(rank, both.wait)) for rank in (2, 0)]
    for thread in threads:
        thread.start()
    until(lambda: len(done) == 8)
    assert not seen  # both wait for rank 1
    work(1, lambda: None)
    for thread in threads:
        thread.join()
    own = {(number % 3, number) for number in range(12)}
    assert own <= set(done)
    assert all(task in own or task[0] == 1 for task in done)  # it came late, and checked
    assert all(sorted(tasks) == list(range(12)) for tasks in seen.values())
    assert len(seen) == 3


def test_what_was_done_before_a_process_began_is_checked_by_it(tmp_path):
    """So a rank that ended need not come back, and damage is found."""
    for number in range(12):
        atomic.save_json(tmp_path / f"{number}.json", number)
        os.utime(tmp_path / f"{number}.json", (0, 1000))
    done = []
    assert sorted(share_tasks(tmp_path, 1, 3, done)) == list(range(12))
    assert {number for _, number in done} == set(range(12))


def test_after_the_last_tasks_only_rank_0_goes_on(tmp_path):
    done = []
    with pytest.raises(ShareDone, match="rank 1 of 2: its share is done; rank 0 waits"):
        share_tasks(tmp_path, 1, 2, done, last=True)
    assert [number for _, number in done] == [1, 3, 5, 7, 9, 11]
    assert sorted(share_tasks(tmp_path, 0, 2, done, last=True)) == list(range(12))


def test_two_processes_of_one_rank_are_refused(tmp_path):
    with locks.released():
        Slurm(tmp_path, Share(1, 2), Local(1))
        caught = []

        def other():
            with pytest.raises(SnipError, match=r"--task_index 1: process \d+ on .* same index"):
                Slurm(tmp_path, Share(1, 2), Local(1))
            caught.append(1)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert caught


def test_who_waits_long_says_for_whom_and_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.05)

    def late():
        for number in (1, 3):
            atomic.save_json(tmp_path / f"{number}.json", 0)

    threading.Timer(0.5, late).start()
    share_tasks(tmp_path, 0, 2, [], 4)
    said = capsys.readouterr().err
    assert "waiting for ranks 1 of 2: no task" in said
    assert "without --task_index" in said


def test_who_wakes_after_the_end_does_nothing(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    for rank in (0, 1):
        done = []
        with pytest.raises(ShareDone, match="is finished"):
            share_tasks(tmp_path, rank, 2, done)
        assert not done


# ---- whole runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Features with lists, and what a run alone makes of them."""
    folder = tmp_path_factory.mktemp("small")
    many_lists(folder / "img")
    run.run(Dedup(features=str(folder / "img"), out=str(folder / "alone")))
    return folder


@pytest.fixture
def start(small, processes, tmp_path):
    """Start a rank of a run in ``tmp_path / "out"``."""

    def begin(rank, world_size, *words, threads=1, **env):
        share = () if rank is None else ("--num_tasks", world_size, "--task_index", rank)
        return processes(
            "dedup", small / "img", "--out", "out", "--threads", threads, *share, *words,
            cwd=tmp_path, **env,
        )  # fmt: skip

    return begin


def test_five_processes_in_shuffled_order(data, undisturbed, processes, tmp_path):
    order = np.random.default_rng(7).permutation(5)
    runs = [
        processes(
            "dedup", data / "keyframes", "--out", "out", "--num_tasks", 5, "--task_index", index,
            cwd=tmp_path, OMP_NUM_THREADS="1",
        )
        for index in order
    ]  # fmt: skip
    assert [process.wait() for process in runs] == [0] * 5, [process.said() for process in runs]
    for rank, process in zip(order, runs, strict=True):
        own = "rows, threshold 0.95" if rank == 0 else f"rank {rank} of 5: its share is done"
        said = process.out.read_text()
        assert own in said or (rank and "is finished" in said)
    assert results(tmp_path / "out") == results(undisturbed)


def test_a_rank_is_killed_and_comes_back(small, start, tmp_path):
    work = tmp_path / "out" / "work"
    runs = [start(rank, 3) for rank in range(3)]
    until(lambda: len(list((work / "join").glob("*.npz"))) > 5)
    killed = runs.pop(1).kill() == -9
    again = start(1, 3) if killed else None
    assert [process.wait() for process in (*runs, again) if run] == [0] * (2 + killed)
    assert results(tmp_path / "out") == results(small / "alone")


def test_a_run_alone_does_what_two_of_three_left(small, start, tmp_path):
    """Two ranks wait for a third that never comes; then one process does what is missing."""
    work = tmp_path / "out" / "work"
    runs = [start(rank, 3) for rank in (0, 2)]
    until(lambda: len(list(work.glob("encode/*/done.json"))) == 2)
    plain = start(None, 0)
    assert plain.wait() == 1
    assert "is being written by another run" in plain.said()
    other = start(1, 3, "--threshold", 0.9)
    assert other.wait() == 1
    assert "holds a stopped run with other threshold (0.95, now 0.9)" in other.said()
    time.sleep(0.5)
    assert all(process.runs() for process in runs)
    assert [process.kill() for process in runs] == [-9, -9]
    held = {path: path.stat().st_ino for path in work.glob("encode/*/*.npy")}
    plain = start(None, 0, "--keep_work")
    assert plain.wait() == 0, plain.said()
    assert all(path.stat().st_ino == inode for path, inode in held.items())
    assert (tmp_path / "out" / "is_dup.npy").read_bytes() == (
        small / "alone" / "is_dup.npy"
    ).read_bytes()


def test_forked_workers_share_a_rank_too(small, start, tmp_path):
    runs = [start(rank, 2, threads=2, FORK_ROWS="1") for rank in range(2)]
    assert [process.wait() for process in runs] == [0, 0], [process.said() for process in runs]
    assert results(tmp_path / "out") == results(small / "alone")


def test_the_script_for_slurm(tmp_path):
    """The page's sbatch example, with its paths, in an array of two."""
    page = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    script = next(b for b in re.findall(r"```bash\n(.*?)```", page, re.S) if "#SBATCH" in b)
    script = script.replace("/data/", f"{tmp_path}/").replace("24GB", "2GB")
    snip = tmp_path / "bin" / "snip"
    snip.parent.mkdir()
    snip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snipdedup "$@"\n')
    snip.chmod(0o755)
    features = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    features[400:] = features[:100]
    for name in ("img_emb", "metadata"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "img_emb" / "0.npy", features)
    pq.write_table(pa.table({"key": range(500)}), tmp_path / "metadata" / "0.parquet")
    path = f"{snip.parent}{os.pathsep}{os.environ['PATH']}"
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
    runs = [
        subprocess.Popen(
            ["bash", "-c", script],
            env={**os.environ, **array, "PATH": path, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (2, 1)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "rank 1 of 2: its share is done" in said[0] or "is finished" in said[0]
    assert "rows, threshold 0.95" in said[1]
    assert np.load(tmp_path / "clean" / "is_dup.npy").sum() == 100
    settings = read_manifest(tmp_path / "clean", "dedup")["settings"]
    assert settings["num_tasks"] is None  # said by Slurm, not by the user
    assert not (tmp_path / "clean" / "work").exists()


def test_a_process_that_wakes_does_not_replace_the_result(small, start, tmp_path, monkeypatch):
    """No locks, as on some file systems: rank 0 sleeps at the end, another rank 0 writes OUT."""
    out, slept = tmp_path / "out", []
    write_files = run.write_files

    def sleeps(result, draft, *rest):
        written = write_files(result, draft, *rest)
        for path in (out / "work").glob("*.lock"):
            path.unlink()  # so that nobody finds them locked
        others = [start(rank, 2) for rank in (0, 1)]
        assert [other.wait() for other in others] == [0, 0], [other.said() for other in others]
        assert "rows, threshold 0.95" in others[0].said()
        slept.append({p: p.stat().st_mtime_ns for p in out.rglob("*")})
        return written

    first = start(1, 2)
    monkeypatch.setattr(run, "write_files", sleeps)
    said = run.run(
        Dedup(features=str(small / "img"), out=str(out), num_tasks=2, task_index=0, threads=1)
    )
    assert first.wait() == 0
    assert "another process wrote it" in said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == slept[0]
    assert results(out) == results(small / "alone")
