"""Files appear whole or not at all; done files prove what a task wrote."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.errors import SnipError
from snipdedup.storage import atomic


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fail_halfway(path, error):
    with atomic.replacing(path) as part:
        part.write_bytes(b"half")
        assert part.name in everything_below(path.parent)
        raise error("disk full")


@pytest.mark.parametrize("error", [RuntimeError, SnipError, KeyboardInterrupt, OSError])
def test_a_failing_write_leaves_neither_file_nor_part(tmp_path, error):
    with pytest.raises((error, SnipError)):
        fail_halfway(tmp_path / "x.bin", error)
    assert everything_below(tmp_path) == []


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        fail_halfway(path, RuntimeError)
    assert path.read_bytes() == b"old"
    assert everything_below(tmp_path) == ["x.bin"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    with atomic.replacing(path) as part:
        part.write_bytes(b"old")
    with atomic.replacing(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_permissions_follow_the_umask(tmp_path):
    script = "import sys; from pathlib import Path; from snipdedup.storage import atomic;"
    script += " atomic.save_json(Path(sys.argv[1]), {})"
    path = tmp_path / "x.json"
    subprocess.run([sys.executable, "-c", script, path], check=True, umask=0o027)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_umask_stays_as_it_is_while_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)  # it is the whole process's, other threads write too
    atomic.save_json(tmp_path / "x.json", {})


def test_an_input_that_cannot_be_read_is_not_called_an_output(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"input\.npy"),
        atomic.replacing(tmp_path / "x.npy") as part,
    ):
        part.write_bytes((tmp_path / "input.npy").read_bytes())
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("512 requested and 128 written"),
    ):
        with (
            pytest.raises(SnipError, match=r"cannot write .*x\.npy: "),
            atomic.replacing(tmp_path / "x.npy"),
        ):
            raise error
    with (
        pytest.raises(SnipError, match=r"cannot write .*x\.npy: "),
        atomic.replacing(tmp_path / "x.npy") as part,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(part))
    assert everything_below(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SnipError, match=r"cannot write .*file/x.npy"):
        atomic.save_npy(tmp_path / "file" / "x.npy", np.ones(2))
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(SnipError, match=r"cannot write .*x.npy"):
        atomic.save_npy(tmp_path / "x.npy", np.ones(2))
    assert everything_below(tmp_path) == ["file", "x.npy"]


def test_objects_are_not_pickled(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        atomic.save_npy(tmp_path / "x.npy", np.array([{}]))
    assert everything_below(tmp_path) == []


def test_what_is_saved_is_read_back(tmp_path):
    mask = np.array([True, False, True])
    atomic.save_npy(tmp_path / "is_dup.npy", mask)
    found = np.load(tmp_path / "is_dup.npy", mmap_mode="r")
    assert found.dtype == bool
    assert np.array_equal(found, mask)
    atomic.save_npz(tmp_path / "x.npz", a=mask, b=np.arange(3))
    with np.load(tmp_path / "x.npz") as arrays:
        assert sorted(arrays) == ["a", "b"]
        assert np.array_equal(arrays["b"], np.arange(3))
    atomic.save_npz(tmp_path / "x.npz", file=mask, allow_pickle=np.float32(3))  # names as any other
    with np.load(tmp_path / "x.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {
            "file": [True, False, True],
            "allow_pickle": 3,
        }
    with pytest.raises(ValueError, match="allow_pickle"):
        atomic.save_npz(tmp_path / "o.npz", a=np.array([{}]))
    assert not (tmp_path / "o.npz").exists()
    table = pa.table({"row": np.arange(4), "key": ["ü", None, "", "b"]})
    atomic.save_parquet(tmp_path / "x.parquet", table)
    assert pq.read_table(tmp_path / "x.parquet").equals(table)
    atomic.save_json(tmp_path / "x.json", {"τ": [1, None, 0.5]})
    assert atomic.load_json(tmp_path / "x.json") == {"τ": [1, None, 0.5]}


def test_json_that_is_none(tmp_path):
    with pytest.raises(SnipError, match=r"no such file: .*x.json"):
        atomic.load_json(tmp_path / "x.json")
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(SnipError, match=r"x.json: expected JSON"):
            atomic.load_json(tmp_path / "x.json")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(SnipError, match=r"d.json: expected JSON"):
        atomic.load_json(tmp_path / "d.json")


def test_a_short_hash_depends_on_values_not_on_order():
    assert atomic.short_hash({"a": 1, "b": [2, 3]}) == atomic.short_hash({"b": [2, 3], "a": 1})
    assert atomic.short_hash({"a": 1, "b": [2, 3]}) != atomic.short_hash({"a": 1, "b": [3, 2]})
    assert atomic.short_hash(0.95) != atomic.short_hash(0.950001)


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert atomic.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_a_done_file_proves_what_it_names(tmp_path):
    (tmp_path / "f").mkdir()
    path, done = tmp_path / "f" / "a.npy", tmp_path / "done.json"
    assert not atomic.is_done(done, tmp_path)
    path.write_bytes(b"rows")
    atomic.write_done_file(done, {"f/a.npy": path}, {"rows": 4})
    assert atomic.is_done(done, tmp_path)
    assert atomic.load_json(done)["rows"] == 4
    whole = done.read_text()
    for broken in (whole.replace("4", "5", 1), whole[: len(whole) // 2], "[]", ""):
        done.write_text(broken)
        assert not atomic.is_done(done, tmp_path)
    done.write_text(whole)
    path.write_bytes(b"rowS")
    assert not atomic.is_done(done, tmp_path)
    path.unlink()
    assert not atomic.is_done(done, tmp_path)
