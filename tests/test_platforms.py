"""What only Linux has is taken away: the same results, by what takes its place."""

from __future__ import annotations

import os
import select
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_files import encoded, photo

from snipdedup import cli, parallel
from snipdedup.pictures import moves, workers
from snipdedup.pictures.items import Item
from snipdedup.pictures.reading import ReadSettings
from snipdedup.pictures.workers import Workers
from snipdedup.runners.local import Local
from snipdedup.storage import locks


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A Python as on Windows, as far as modules and functions of the system go."""
    del tmp_path  # pytest makes it with what is taken away here
    for module, name in (
        (select, "poll"), (os, "sched_getaffinity"), (os, "sysconf"), (os, "getuid"),
    ):  # fmt: skip
        monkeypatch.delattr(module, name, raising=False)
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails


def test_the_same_bytes_without(bare, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    rows[400:] = rows[:100]
    np.save(tmp_path / "rows.npy", rows)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["dedup", "rows.npy", "--out", "bare"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.run(["dedup", "rows.npy", "--out", "whole"]) == 0
    for name in ("is_dup.npy", "groups.parquet", "forest.parquet"):
        assert Path("bare", name).read_bytes() == Path("whole", name).read_bytes()


def test_what_the_system_does_not_say(bare):
    assert parallel.machine_memory() == 8 << 30
    assert parallel.most_open_files() == 512
    assert parallel.cores() == os.cpu_count()
    assert cli.stdout_is_closed()  # it is asked after a broken pipe only


def test_no_bound_on_open_files(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert parallel.most_open_files() > 1000


def corner(picture):
    """Stands for a model's `prepare`; one picture hangs."""
    if picture.getpixel((0, 0)) == (255, 0, 0):
        threading.Event().wait()
    return np.full((5,), 7, np.int32)


def test_pictures_without_poll(bare, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 1.0)
    hangs = photo(0, (8, 8))
    hangs.putpixel((0, 0), (255, 0, 0))
    items = [
        Item(f"k{n}", {"path": "/p"}, encoded(hangs if n == 1 else photo(n, (8, 8)), "PNG"))
        for n in range(3)
    ]
    pool = Workers(ReadSettings(corner, 5, 10**6, None), 1)
    try:
        found = list(pool.results(items))
    finally:
        pool.close()
    assert [hasattr(one, "prepared") for one in found] == [True, False, True]
    assert "exit status" in found[1].reason or "SIGKILL" in found[1].reason


@pytest.mark.parametrize("fault", [NotImplementedError("follow_symlinks"), OSError(1, "no links")])
def test_moves_without_hard_links(tmp_path, monkeypatch, fault):
    def link(*_, **__):
        raise fault

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "taken").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        moves.place(tmp_path / "a", tmp_path / "taken")
    moves.place(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["b", "taken"]


def test_a_lock_whose_open_file_cannot_be_removed(tmp_path, monkeypatch):
    unlink = Path.unlink

    def of_windows(path, missing_ok=False):
        if path in locks._own.files or any(not file.closed for file in opened):
            raise PermissionError(13, "open elsewhere", str(path))
        unlink(path, missing_ok=missing_ok)

    path = tmp_path / "run.lock"
    assert locks.acquire(path) is None
    opened = [locks._own.files[path]]
    monkeypatch.setattr(Path, "unlink", of_windows)
    locks.remove(path)
    assert not path.exists()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_forks_on_linux_only(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    runner, threads = Local(2, forks=True, device="cpu"), set()
    tasks = list(range(8))
    done = list(runner.each(lambda _: threads.add(os.getpid()), tasks, lambda _: Path()))
    assert (done, threads) == (tasks, {os.getpid()})
