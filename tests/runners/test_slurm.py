"""Processes that share a folder do together what one does alone, however they come and go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from processes import many_lists, results, until

from snipdedup.config import Dedup
from snipdedup.deduplication import run
from snipdedup.errors import UsageError
from snipdedup.runners.slurm import Crew, Place, Written, own_first, place_of
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, read_manifest

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}


def asked(**settings):
    return Dedup(**{"features": "x", "out": "y", **settings})


# ---- which of how many


def test_a_place_by_flags():
    assert place_of(asked(num_tasks=7, task_index=6), {}) == Place(6, 7)
    assert place_of(asked(num_tasks=7, task_index=6), ARRAY) == Place(6, 7)
    assert place_of(asked(), {}) is None


def test_a_place_in_a_slurm_array():
    assert place_of(asked(), ARRAY) == Place(2, 3)
    assert place_of(asked(num_tasks=9), ARRAY) == Place(2, 9)
    steps = {**ARRAY, "SLURM_ARRAY_TASK_ID": "25", "SLURM_ARRAY_TASK_STEP": "10"}
    assert place_of(asked(), steps) == Place(2, 3)
    gaps = {**ARRAY, "SLURM_ARRAY_TASK_ID": "99"}  # --array=5,7,99
    assert place_of(asked(), gaps).number in range(3)
    assert place_of(asked(), {**ARRAY, "SLURM_ARRAY_TASK_ID": "x"}) is None


def test_an_array_is_no_matter_to_what_cannot_be_shared():
    for settings in ({"method": "exact"}, {"overwrite": True}, {"runner": "ray"}):
        assert place_of(asked(**settings), ARRAY) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": 7}, "give --task_index too"),
        ({"task_index": 0}, "give --num_tasks too"),
        ({"task_index": 0, "num_tasks": 1, "out": None}, "needs --out"),
    ],
)
def test_half_a_place_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        place_of(asked(**settings), {})


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


def test_own_tasks_come_first():
    assert own_first("abcdefg", Place(1, 3)) == list("becfadg")
    assert own_first("abc", Place(5, 9)) == list("abc")
    for number in range(4):
        assert sorted(own_first(range(10), Place(number, 4))) == list(range(10))


# ---- the crew itself


def do_tasks(crew, folder, done, count=12):
    def do(number):
        done.append(number)
        atomic.save_json(folder / f"{number}.json", number)

    return list(crew.each(do, range(count), lambda number: folder / f"{number}.json"))


def test_each_task_is_done_by_one(tmp_path):
    done, seen = [], []

    def work(number):
        with Crew(tmp_path, Place(number, 3), 1) as crew:
            seen.append(sorted(do_tasks(crew, tmp_path / "marks", done)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(12))
    assert seen == [list(range(12))] * 3


def test_marks_of_an_earlier_session_are_looked_at_again(tmp_path):
    done = []
    with Crew(tmp_path, Place(0, 2), 1) as first:
        do_tasks(first, tmp_path / "marks", done)
        with Crew(tmp_path, Place(1, 2), 1) as second:  # the same session
            do_tasks(second, tmp_path / "marks", done)
    assert len(done) == 12
    for mark in (tmp_path / "marks").iterdir():
        os.utime(mark, (0, 1000))
    with Crew(tmp_path, Place(1, 2), 1) as later:
        do_tasks(later, tmp_path / "marks", done)
        do_tasks(later, tmp_path / "marks", done)
    assert len(done) == 24


def test_a_task_that_fails_is_free_for_others(tmp_path):
    def fail(number):
        raise OSError("no")

    with Crew(tmp_path, Place(0, 2), 1) as first, Crew(tmp_path, Place(1, 2), 1) as second:
        with pytest.raises(OSError, match="no"):
            list(first.each(fail, [1], lambda number: tmp_path / "1.json"))
        assert do_tasks(second, tmp_path, [], 2) == [1, 0]


def test_a_task_that_fails_when_all_is_written_does_not_matter(tmp_path):
    def late(number):
        (tmp_path / MANIFEST).write_text("{}")
        raise FileNotFoundError("work is gone")

    with Crew(tmp_path, Place(0, 2), 1) as crew, pytest.raises(Written):
        list(crew.each(late, [1], lambda number: tmp_path / "1.json"))


def test_one_writes_and_the_others_see_it(tmp_path):
    with Crew(tmp_path, Place(0, 2), 1) as first, Crew(tmp_path, Place(1, 2), 1) as second:
        first.finish()
        threading.Timer(0.2, lambda: (tmp_path / MANIFEST).write_text("{}")).start()
        with pytest.raises(Written, match="another of the 2 processes wrote it"):
            second.finish()
        with pytest.raises(Written):
            do_tasks(second, tmp_path, [])


# ---- whole runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Features with lists, and what a run alone makes of them."""
    folder = tmp_path_factory.mktemp("small")
    many_lists(folder / "img")
    run.run(Dedup(features=str(folder / "img"), out=str(folder / "alone")))
    return folder


def test_seven_processes_in_shuffled_order(data, undisturbed, processes, tmp_path):
    order = np.random.default_rng(7).permutation(7)
    runs = [
        processes(
            "dedup", data / "keyframes", "--out", "out", "--num_tasks", 7, "--task_index", index,
            cwd=tmp_path, OMP_NUM_THREADS="1",
        )
        for index in order
    ]  # fmt: skip
    assert [run.wait() for run in runs] == [0] * 7, [run.said() for run in runs]
    said = [run.said() for run in runs]
    assert sum("rows, threshold 0.95" in text for text in said) == 1
    assert sum("out is finished" in text for text in said) == 6
    assert results(tmp_path / "out") == results(undisturbed)


def test_one_of_seven_is_killed_and_two_never_come(small, processes, tmp_path):
    def start(index):
        return processes(
            "dedup", small / "img", "--out", "out", "--threads", 1, "--num_tasks", 7,
            "--task_index", index, cwd=tmp_path,
        )  # fmt: skip

    runs = [start(index) for index in (4, 0, 2, 6, 1)]
    until(lambda: list((tmp_path / "out" / "work" / "join").glob("*.npz")))
    killed = runs.pop(2)
    assert killed.kill() == -9
    assert [run.wait() for run in runs] == [0] * 4, [run.said() for run in runs]
    assert results(tmp_path / "out") == results(small / "alone")


def test_one_after_another_stopped_and_alone(small, processes, tmp_path):
    """A process does its share and more, is killed; the next one goes on, and ends alone."""
    work = tmp_path / "out" / "work"
    words = ("dedup", small / "img", "--out", "out", "--num_tasks", 7, "--task_index")
    first = processes(*words, 3, cwd=tmp_path)
    until(lambda: len(list((work / "join").glob("*.npz"))) > 5)
    assert first.kill() == -9
    held = {path: path.stat().st_ino for path in work.rglob("*") if path.is_file()}
    other = processes(*words, 0, "--threshold", 0.9, cwd=tmp_path)
    assert other.wait() == 1
    assert "holds a stopped run with other threshold (0.95, now 0.9)" in other.said()
    second = processes(*words, 5, cwd=tmp_path)
    until(lambda: len(list((work / "join").glob("*.npz"))) > 10)
    assert all(path.stat().st_ino == held[path] for path in held if path.suffix in (".npy", ".npz"))
    assert second.wait() == 0, second.said()
    assert results(tmp_path / "out") == results(small / "alone")


def test_a_plain_run_keeps_out_of_a_shared_one(small, processes, tmp_path):
    words = ("dedup", small / "img", "--out", "out")
    shared = processes(*words, "--num_tasks", 2, "--task_index", 0, cwd=tmp_path)
    until((tmp_path / "out" / "work" / "model.npz").is_file)
    plain = processes(*words, cwd=tmp_path)
    assert plain.wait() == 1
    assert "is being written by another run" in plain.said()
    assert shared.wait() == 0, shared.said()
    assert results(tmp_path / "out") == results(small / "alone")


def test_the_script_for_slurm(tmp_path):
    """The page's sbatch example, with its paths, in an array of three of which two come."""
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
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    runs = [
        subprocess.Popen(
            ["bash", "-c", script],
            env={**os.environ, **array, "PATH": path, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (3, 1)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("is finished" in text for text in said) == 1, said
    assert np.load(tmp_path / "clean" / "is_dup.npy").sum() == 100
    settings = read_manifest(tmp_path / "clean", "dedup")["settings"]
    assert settings["num_tasks"] is None  # said by Slurm, not by the user
    assert not (tmp_path / "clean" / "work").exists()


def test_a_process_that_wakes_does_not_replace_the_result(small, processes, tmp_path, monkeypatch):
    """One is at the end and taken for dead; another writes OUT; then the first one goes on."""
    out, slept = tmp_path / "out", []
    words = {"features": str(small / "img"), "num_tasks": 2}
    write_tables = run.write_tables

    def sleeps(result, draft, *rest):
        written = write_tables(result, draft, *rest)
        alive = next((out / "work" / "claims").glob(f"alive-{os.getpid()}-*"))
        alive.unlink()  # as if it had not been heard of for long
        other = processes(
            "dedup", small / "img", "--out", "out", "--num_tasks", 2, "--task_index", 1,
            cwd=tmp_path,
        )  # fmt: skip
        assert other.wait() == 0, other.said()
        assert "rows, threshold 0.95" in other.said()
        slept.append({p: p.stat().st_mtime_ns for p in out.rglob("*")})
        return written

    monkeypatch.setattr(run, "write_tables", sleeps)
    said = run.run(Dedup(out=str(out), task_index=0, **words))
    assert "another of the 2 processes wrote it" in said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == slept[0]
    assert results(out) == results(small / "alone")
