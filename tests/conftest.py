"""What tests share: the real data, and `snip` as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SNIP_TEST_DATA", ROOT.parent / "shared" / "data"))

# Machines are shared: how long one example takes says nothing about the code.
hypothesis.settings.register_profile("snip", deadline=None)
hypothesis.settings.load_profile("snip")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real features; skip where it is absent."""
    if not (DATA / "keyframes" / "img_emb").is_dir():
        if os.environ.get("CI") and DATA.exists():
            pytest.fail(f"{DATA} has no keyframes/img_emb: real data is there, but not whole")
        pytest.skip(f"no real data at {DATA}; set SNIP_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def snip():
    """Run the command line in a process of its own; return the finished process."""

    def run(*words: object, status: int = 0, **options: object) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "snipdedup", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, see `browser.Browser`; skip where there can be none."""
    from browser import launched

    with launched() as found:
        yield found


@pytest.fixture(scope="session")
def processes():
    """Start `snip` in a process that has all imported already, see `processes.nursery`."""
    from processes import nursery

    with nursery() as start:
        yield start


@pytest.fixture(scope="session")
def undisturbed(data, processes, tmp_path_factory) -> Path:
    """What a run over keyframes writes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = processes("dedup", data / "keyframes", "--out", "out", cwd=folder)
    assert run.wait() == 0, run.said()
    return folder / "out"
