"""Ray workers do what threads do; one that dies is no matter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import many_lists, results, until

from snipdedup.config import Dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.runners import ray


def start(*words, cwd):
    """Start `snip` in a process of its own."""
    with (cwd / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "snipdedup", *map(str, words)], cwd=cwd, stdout=log, stderr=log
        )


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def workers_of(driver):
    """Return the Ray workers below a process that are at a task."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not (entry / "cmdline").read_bytes().startswith(b"ray::perform"):
                continue
        except OSError:
            continue
        pid = above = int(entry.name)
        while above > 1 and above != driver:
            above = parent_of(above)
        if above == driver:
            found.append(pid)
    return found


def test_two_workers_find_what_threads_find(data, undisturbed, tmp_path):
    pytest.importorskip("ray")
    run = start(
        "dedup", data / "keyframes", "--out", "out", "--runner", "ray", "--threads", 2,
        cwd=tmp_path,
    )  # fmt: skip
    killed = []
    try:
        until(lambda: run.poll() is not None or killed or kill(workers_of(run.pid), killed))
        assert run.wait(240) == 0, (tmp_path / "log").read_text()
    finally:
        run.kill()
        run.wait()
    assert killed, "no worker was seen at a task"
    assert results(tmp_path / "out") == results(undisturbed)


def kill(workers, killed):
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    return killed


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again(processes, tmp_path):
    """Each time that another task is done a worker goes."""
    pytest.importorskip("ray")
    many_lists(tmp_path / "img", 200_000)
    alone = processes("dedup", "img", "--out", "alone", cwd=tmp_path)
    assert alone.wait() == 0
    run = start("dedup", "img", "--out", "out", "--runner", "ray", "--threads", 2, cwd=tmp_path)
    killed, seen = [], set()
    work = tmp_path / "out" / "work"

    def marks():
        return {*work.glob("encode/*/done.json"), *work.glob("join/*.npz")}

    while run.poll() is None and len(killed) < 6:
        if len(marks()) >= len(seen) + 2:
            seen = marks()
            kill(workers_of(run.pid), killed)
    assert run.wait(240) == 0, (tmp_path / "log").read_text()
    assert len(killed) >= 4
    assert results(tmp_path / "out") == results(tmp_path / "alone")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SnipError, match=r"pip install 'snipdedup-toolkit\[ray\]'"):
        ray.Ray(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "exact"}, "--runner ray goes with --method join, not exact"),
        ({"device": "cuda"}, "computes on CPUs"),
    ],
)
def test_what_does_not_go_together(settings, said):
    with pytest.raises(UsageError, match=said):
        Dedup(features="x", out="y", runner="ray", **settings)


def test_arrays_are_not_sent(tmp_path):
    with pytest.raises(UsageError, match="files"):
        Dedup(features=np.zeros((3, 4)), runner="ray")


class Refusing:
    """A Ray that does not connect, as far as `connect` uses one."""

    class exceptions:  # noqa: N801
        RayError = type("AuthenticationError", (Exception,), {})

    def __init__(self, error):
        self.error = error

    def init(self, **_):
        raise self.error


@pytest.mark.parametrize(
    "error", [ConnectionError("Failed to connect"), Refusing.exceptions.RayError("No token")]
)
def test_a_cluster_that_does_not_answer_or_refuses_the_token(monkeypatch, error):
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    with pytest.raises(SnipError, match=rf"host:6379: .*{error}.*RAY_AUTH_MODE=token"):
        ray.connect(Refusing(error), 1)
