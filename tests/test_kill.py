"""Killed at any instant and started again, a run ends as one does that nothing disturbs."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from processes import many_lists, results, until

from snipdedup.storage import atomic
from snipdedup.storage.out_folder import read_manifest

KILLED, DONE = -9, 0
# What stands when a stage begins; of the files of OUT the first and the last.
STAGES = {
    "fit": "work/request.json",
    "encode": "work/model.npz",
    "scan": "work/encode/000001/done.json",
    "join": "work/plan.json",
    "merge": "work/join/*.npz",
    "write": "**/is_dup.npy",
    "end": "snip.json",
}


def files(out):
    """Return all files of OUT that are whole, but the lock, by their inodes."""
    found = {}
    seen = [Path(folder) / name for folder, _, names in os.walk(out) for name in names]
    for path in seen:  # unlike rglob, walk does not mind a folder that is gone by then
        if not path.name.startswith(".") and path.suffix not in (".lock", ".part"):
            try:
                found[path] = path.stat().st_ino if path.is_file() else None
            except FileNotFoundError:  # it was there a moment ago
                continue
    return {path: inode for path, inode in found.items() if inode is not None}


def refuse_redone(before, after):
    """Fail where a task that was done is done again: what it left is another file now."""
    for path, inode in before.items():
        sealed = path.parent / "done.json" in before
        done = sealed or path.parent.name == "join" or path.name == "model.npz"
        assert not done or path not in after or after[path] == inode, path


class Life:
    """An OUT whose runs are killed until one of them ends."""

    def __init__(self, start, folder, name, *words, **env):
        self.start, self.folder, self.words = start, folder, (*words, "--out", name)
        self.env = env
        self.out, self.kills, self.held = folder / name, 0, {}

    def once(self, instant):
        """Run until ``instant(run)`` returns, then kill; tell whether the run was faster."""
        run = self.start("dedup", *self.words, cwd=self.folder, **self.env)
        instant(run)
        status = run.kill()
        assert status in (KILLED, DONE), run.said()
        self.kills += status == KILLED
        now = files(self.out)
        refuse_redone(self.held, now)
        self.held = now
        return status == DONE

    def to_the_end(self):
        run = self.start("dedup", *self.words, cwd=self.folder, **self.env)
        assert run.wait() == DONE, run.said()


def stands(out, pattern):
    return any(out.glob(pattern))


def stage_seconds(start, folder, *words):
    """Return how long each stage of an undisturbed run takes, in order."""
    out = folder / "timed"
    run = start("dedup", *words, "--out", "timed", cwd=folder)
    begun = {"start": time.monotonic()}
    while len(begun) <= len(STAGES):
        for stage, pattern in STAGES.items():
            if stage not in begun and stands(out, pattern):
                begun[stage] = time.monotonic()
        assert run.runs() or stands(out, STAGES["end"])
    assert run.wait() == DONE
    ends = [*list(begun.values())[1:], begun["end"] + 0.05]
    return {
        stage: max(0.0, end - start)
        for (stage, start), end in zip(begun.items(), ends, strict=True)
    }


def live_through(life, seconds, rng):
    """Kill once in each stage, at a random instant of it."""
    for stage, usual in seconds.items():

        def instant(run, stage=stage, usual=usual):
            if stage in STAGES:
                until(lambda: not run.runs() or stands(life.out, STAGES[stage]))
            time.sleep(rng.uniform(0, usual))

        if life.once(instant):
            break
    life.to_the_end()


@pytest.mark.slow
def test_killed_at_random_instants_of_all_stages(data, undisturbed, processes, tmp_path):
    rng, kills, turn = np.random.default_rng(), 0, 0
    seconds = stage_seconds(processes, tmp_path, data / "keyframes")
    while kills < 30:
        life = Life(processes, tmp_path, f"out-{turn}", data / "keyframes")
        live_through(life, seconds, rng)
        assert results(life.out) == results(undisturbed)
        kills, turn = kills + life.kills, turn + 1


FORKED = {"FORK_ROWS": "1"}  # as for a large set


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FORKED], ids=["threads", "processes"])
def test_killed_at_random_instants_with_many_tasks(processes, tmp_path, env):
    rng, kills, turn = np.random.default_rng(), 0, 0
    many_lists(tmp_path / "img")
    seconds = stage_seconds(processes, tmp_path, "img")
    while kills < 25:
        life = Life(processes, tmp_path, f"out-{turn}", "img", **env)
        for _ in range(5):  # anywhere: most of it is fitting and joining
            life.once(lambda run: time.sleep(rng.uniform(0, sum(seconds.values()) / 2)))
        live_through(life, seconds, rng)
        assert results(life.out) == results(tmp_path / "timed")
        kills, turn = kills + life.kills, turn + 1


def named(path):
    """Return a file's name without that of its run's draft, which is another in each run."""
    return re.sub(r"draft-\w+", "draft", str(path))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["keyframes", "many"])
def test_killed_as_each_file_appears(data, processes, tmp_path, which):
    source = data / "keyframes" if which == "keyframes" else many_lists(tmp_path / "img")
    alone = Life(processes, tmp_path, "alone", source)
    alone.to_the_end()
    life = Life(processes, tmp_path, "out", source)

    def lasting(found):  # what is sorted in files goes again at once, and comes with every run
        return {named(path) for path in found if "grouping" not in path.parts}

    def new_file(run):
        until(lambda: not run.runs() or lasting(files(life.out)) - lasting(life.held))

    while not life.once(new_file):
        assert life.kills < 300
    assert life.kills >= 20
    life.to_the_end()
    assert results(life.out) == results(alone.out)


def whole(out, results_of):
    """Tell which of some results a copy of OUT holds, as a reader that comes now finds it."""
    manifest = read_manifest(out, "dedup")
    for name, said in manifest["outputs"].items():
        assert atomic.sha256(out / name) == said["sha256"], name
    found = {name: data for name, data in results(out).items() if not name.startswith("work/")}
    return [name for name, expected in results_of.items() if found == expected]


@pytest.mark.slow
def test_killed_as_each_file_appears_while_it_overwrites(processes, tmp_path):
    """The earlier result is whole until the new one is, for readers at any time in between."""
    many_lists(tmp_path / "img", 900)
    said = {
        "earlier": ("img", "--threshold", 0.9),
        "later": ("img", "--pairs", "--export", "mask", "--overwrite"),
    }
    held = {}
    for name, words in said.items():
        run = processes("dedup", *words, "--out", name, cwd=tmp_path)
        assert run.wait() == DONE, run.said()
        held[name] = results(tmp_path / name)
    shutil.copytree(tmp_path / "earlier", tmp_path / "out")
    life = Life(processes, tmp_path, "out", *said["later"])
    seen, known = [], set(map(named, files(life.out)))

    def new_file(run):
        until(lambda: not run.runs() or set(map(named, files(life.out))) - known)
        known.update(map(named, files(life.out)))

    for _ in range(100):
        done = life.once(new_file)
        shutil.copytree(life.out, tmp_path / f"copy-{len(seen)}")
        seen += whole(tmp_path / f"copy-{len(seen)}", held)
        assert len(seen) == life.kills + done
        if seen[-1] == "later":
            break
    assert seen == ["earlier"] * (len(seen) - 1) + ["later"]
    assert len(seen) > 4
    life.to_the_end()
    assert results(life.out) == held["later"]


def test_killed_after_marks(data, undisturbed, processes, tmp_path):
    life = Life(processes, tmp_path, "out", data / "keyframes")
    for mark in ("encode", "scan", "merge", "write", "end"):
        life.once(
            lambda run, mark=mark: until(lambda: not run.runs() or stands(life.out, STAGES[mark]))
        )
    life.to_the_end()
    assert life.kills >= 3
    assert results(life.out) == results(undisturbed)


def test_forked_workers_die_with_the_run_and_leave_its_folder_to_the_next(processes, tmp_path):
    source = many_lists(tmp_path / "img")
    alone = Life(processes, tmp_path, "alone", source)
    alone.to_the_end()
    life = Life(processes, tmp_path, "out", source, "--threads", "3", **FORKED)
    for mark in ("encode", "scan", "join", "merge"):
        life.once(
            lambda run, mark=mark: until(lambda: not run.runs() or stands(life.out, STAGES[mark]))
        )
    life.to_the_end()
    assert life.kills >= 3
    assert results(life.out) == results(alone.out)


def test_what_a_killed_run_had_begun_to_write_goes(data, undisturbed, processes, tmp_path):
    """A table half-written, in OUT or below it, is no part of the next run's result."""
    life = Life(processes, tmp_path, "out", data / "keyframes")
    life.once(lambda run: until(lambda: stands(life.out, STAGES["write"])))
    for place in (life.out, life.out / "metadata"):
        place.mkdir(exist_ok=True)
        (place / ".forest.parquet.x1y2z3.part").write_text("PAR1")
    life.to_the_end()
    assert results(life.out) == results(undisturbed)


def test_a_run_killed_just_after_its_end_leaves_nothing(processes, tmp_path):
    """The manifest stands, the work is still there: the next run removes it."""
    many_lists(tmp_path / "img", 1000)
    words = ("dedup", "img", "--out", "out")
    assert processes(*words, "--keep_work", cwd=tmp_path).wait() == DONE
    assert processes(*words, cwd=tmp_path).wait() == DONE
    assert (tmp_path / "out" / "work" / "model.npz").is_file()  # as was asked
    manifest = tmp_path / "out" / "snip.json"
    manifest.write_text(manifest.read_text().replace('"keep_work": true', '"keep_work": false'))
    again = processes(*words, cwd=tmp_path)
    assert again.wait() == DONE
    assert "is finished already" in again.said()
    assert not (tmp_path / "out" / "work").exists()
