"""A claim has one owner, and counts for as long as the owner lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from snipdedup.errors import SnipError
from snipdedup.runners import claims
from snipdedup.runners.claims import Claims

TAKE = """
import sys, time
from pathlib import Path
from snipdedup.runners.claims import Claims
with Claims(Path(sys.argv[1])) as mine:
    print(mine.take("x"), mine.owner, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which claims x."""
    words = [sys.executable, "-c", TAKE, str(tmp_path / "c")]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    taken, child.owner = child.stdout.readline().split()
    assert taken == "True"
    yield child
    child.kill()
    child.communicate()


def test_a_claim_has_one_owner(tmp_path):
    with Claims(tmp_path / "c") as mine, Claims(tmp_path / "c") as other:
        assert mine.take("x")
        assert mine.take("x")  # it has it already
        assert not other.take("x")
        assert other.take("y")
        mine.give_up("x")
        assert other.take("x")
        assert not mine.take("x")
        assert mine.holder("x")[0].startswith(f"process {os.getpid()} on ")


def test_what_an_owner_had_is_free_when_it_ends(tmp_path):
    with Claims(tmp_path / "c") as other:
        with Claims(tmp_path / "c") as mine:
            assert mine.take("x")
            assert not other.take("x")
        assert other.take("x")
    assert not list((tmp_path / "c").glob("alive-*"))


def test_a_killed_owner_of_this_machine_is_seen_at_once(tmp_path, other):
    with Claims(tmp_path / "c") as mine:
        assert not mine.take("x")
        assert mine.holder("x")[0].startswith(f"process {other.pid} on ")
        other.kill()
        other.wait()
        assert mine.take("x")
        with Claims(tmp_path / "c") as third:
            assert not third.take("x")


def test_an_owner_elsewhere_is_gone_when_not_heard_of(tmp_path, other, monkeypatch):
    alive = tmp_path / "c" / f"alive-{other.owner}"
    with Claims(tmp_path / "c") as mine:
        monkeypatch.setattr(mine, "host", "elsewhere@1")
        other.kill()
        other.wait()
        assert not mine.take("x")  # who knows
        now = mine.now()
        os.utime(alive, (now, now - claims.STALE_S + 5))
        assert not mine.take("x")
        os.utime(alive, (now, now - claims.STALE_S - 5))
        assert mine.take("x")


def test_an_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with Claims(tmp_path / "c") as mine:
        os.utime(mine.alive, (0, 0))
        end = time.monotonic() + 20
        while mine.alive.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_claim_that_is_being_written_counts(tmp_path):
    with Claims(tmp_path / "c") as mine:
        (tmp_path / "c" / "x.0").touch()
        assert not mine.take("x")
        os.utime(tmp_path / "c" / "x.0", (0, 0))  # its owner died between making and writing it
        assert mine.take("x")


def test_many_want_one(tmp_path):
    """A dead owner's claim is taken over by one of many, time and again."""
    for turn in range(20):
        folder = tmp_path / str(turn)
        with Claims(folder) as gone:
            assert gone.take("x")
        crowd = [Claims(folder).__enter__() for _ in range(8)]
        got, gate = [], threading.Barrier(len(crowd))

        def want(claim, got=got, gate=gate):
            gate.wait()
            got.append(claim.take("x"))

        threads = [threading.Thread(target=want, args=(claim,)) for claim in crowd]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for claim in crowd:
            claim.__exit__(None, None, None)
        assert sorted(got) == [False] * 7 + [True]


def test_where_the_folder_is_gone_nothing_can_be_claimed(tmp_path):
    with Claims(tmp_path / "c") as mine:
        mine.alive.unlink()
        (tmp_path / "c").rmdir()
        assert not mine.take("x")
        assert mine.holder("x") is None
        mine.give_up("x")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(SnipError, match="cannot write"), Claims(tmp_path / "c"):
        pass


def test_a_suspended_owner_of_this_machine_has_what_it_had(tmp_path, other, monkeypatch):
    """It may go on at any time, whatever its last sign of life; its number may be another's."""
    alive = tmp_path / "c" / f"alive-{other.owner}"
    other.send_signal(signal.SIGSTOP)
    os.utime(alive, (0, 0))
    with Claims(tmp_path / "c") as mine:
        assert not mine.take("x")
        monkeypatch.setattr(claims, "begun", lambda pid: "another time")
        assert mine.take("x")


def test_who_was_taken_for_dead_sees_that_it_lost(tmp_path, monkeypatch):
    with Claims(tmp_path / "c") as mine, Claims(tmp_path / "c") as other:
        monkeypatch.setattr(other, "host", "elsewhere@1")
        assert mine.take("x")
        os.utime(mine.alive, (0, 0))
        assert other.take("x")
        assert not mine.take("x")
        other.give_up("x")
        assert mine.take("x")
