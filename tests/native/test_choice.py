"""Which kernels are used: the fastest that the machine has, or those asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from snipdedup import native
from snipdedup.errors import UsageError

SHOW = "from snipdedup import native; print(native.used())"


def used_with(choice):
    environment = {**os.environ, "SNIPDEDUP_NATIVE": choice}
    return subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=False
    )


def test_numpy_is_always_there_and_the_fastest_is_used():
    assert native.names()[-1] == "numpy"
    assert len(set(native.names())) == len(native.names())
    assert used_with("").stdout.strip() == native.names()[0]


def test_those_asked_for_are_used():
    for name in (native.names()[-2:][0], "numpy", "0"):
        done = used_with(name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == ("numpy" if name == "0" else name)


def test_others_are_refused(kernels):
    with pytest.raises(UsageError, match=r"SNIPDEDUP_NATIVE=sse9: this machine has .*numpy"):
        native.use("sse9")
    assert native.used() == kernels
    done = used_with("sse9")
    assert done.returncode == 1
    assert "UsageError: SNIPDEDUP_NATIVE=sse9" in done.stderr


def test_the_command_line_refuses_others_in_one_line(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(8, dtype=np.float32))
    words = [sys.executable, "-m", "snipdedup", "dedup", "x.npy", "--out", "out"]
    environment = {**os.environ, "SNIPDEDUP_NATIVE": "sse9"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "SNIPDEDUP_NATIVE=sse9: this machine has" in done.stderr
    assert not (tmp_path / "out").exists()
