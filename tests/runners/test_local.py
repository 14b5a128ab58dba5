"""Forked workers do each task once, say what failed, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from snipdedup import cli, runners
from snipdedup.errors import InputError, SnipError
from snipdedup.join import model
from snipdedup.runners import local
from snipdedup.runners.local import in_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 17])
def test_each_task_is_done_once_by_another_process(workers, count, tmp_path):
    def do(task):
        with (tmp_path / task).open("x") as file:  # fails where it was done already
            file.write(str(os.getpid()))

    tasks = [f"task {number}" for number in range(count)]
    assert sorted(in_processes(do, tasks, workers)) == sorted(tasks)
    pids = {int((tmp_path / task).read_text()) for task in tasks}
    assert os.getpid() not in pids
    assert len(pids) <= workers
    all_end(pids)


def all_end(pids):
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))


@pytest.mark.parametrize("error", [InputError("shard 3: row 7 is bad"), OSError(28, "full", "x")])
def test_what_a_task_raises_comes_out(error):
    def do(task):
        if task == 4:
            raise error

    with pytest.raises(type(error)) as caught:
        list(in_processes(do, range(100), 2))
    assert str(caught.value) == str(error)


def test_a_worker_that_is_killed_is_no_task_done():
    def do(task):
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

    with pytest.raises(SnipError, match=r"ended early.* --max_memory or fewer --threads"):
        list(in_processes(do, range(6), 2))


def test_workers_end_where_no_more_is_asked_for(tmp_path):
    def do(task):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0 if task == 0 else 60)

    results = in_processes(do, range(10), 2)
    assert next(results) == 0
    results.close()
    all_end([path.name for path in tmp_path.iterdir()])


ORPHANS = """
import os, sys, time
from snipdedup.runners.local import in_processes

def do(task):
    os.write(1, b"%d\\n" % os.getpid())  # at once, whoever else writes
    time.sleep(60)

list(in_processes(do, range(2), 2))
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    all_end(pids)


def test_processes_and_threads_find_the_same(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6000, 24))
    x[3000:] = x[:3000] + rng.choice([0, 0.05, 0.4], (3000, 1)) * rng.standard_normal((3000, 24))
    np.save(tmp_path / "img_emb_0.npy", x.astype(np.float16))
    outs, seen = [tmp_path / "threads", tmp_path / "processes"], []

    def counted(do, tasks, workers):
        seen.append(len(tasks))
        return in_processes(do, tasks, workers)

    for out, least in zip(outs, (1 << 40, 1), strict=True):
        with (
            mock.patch.object(runners, "FORK_ROWS", least),
            mock.patch.object(local, "in_processes", counted),
            mock.patch.object(model, "SINGLE_LIST_ROWS", 100),
        ):
            words = ["dedup", str(tmp_path / "img_emb_0.npy"), "--out", str(out), "--threads", "2"]
            assert cli.run(words) == 0
    assert seen  # only the second time
    for name in ("is_dup.npy", "forest.parquet", "groups.parquet"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
