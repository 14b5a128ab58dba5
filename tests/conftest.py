"""What tests share: the real data, and `snip` as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from snipdedup import native
from snipdedup.features.shards import open_features

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


@pytest.fixture(params=native.names())
def kernels(request):
    """The name of kernels that the test runs with; all tests run with each that there are."""
    before = native.used()
    native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture(scope="session")
def small_index(tmp_path_factory):
    """An index of random directions with copies and near copies, and its features."""
    from samples import make, with_copies

    features = open_features(with_copies())
    return make(features, tmp_path_factory.mktemp("small") / "x", nlist=4), features


@pytest.fixture(scope="session")
def real_index(data, tmp_path_factory):
    """An index of two shards of key frames, and its features."""
    from samples import make

    names = [str(data / "keyframes" / "img_emb" / f"img_emb_000{n}.npy") for n in (0, 1)]
    features = open_features(names)
    out = tmp_path_factory.mktemp("real") / "x"
    return make(features, out, nlist=64, m=16, threads=2, train_rows=6000), features


@pytest.fixture(scope="session")
def snip(processes, tmp_path_factory):
    """Run the command line in a process of its own; return the finished process.

    It has imported all already, unless ``options`` of `subprocess.run` are given.
    """
    logs = tmp_path_factory.mktemp("snip")

    def run(
        *words: object, status: int = 0, cwd: Path | None = None, **options: object
    ) -> subprocess.CompletedProcess:
        if options:
            command = [sys.executable, "-m", "snipdedup", *map(str, words)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=cwd, **options
            )
        else:
            at = processes(*words, cwd=Path.cwd() if cwd is None else cwd, logs=logs)
            code = at.wait()
            done = subprocess.CompletedProcess(words, code, at.out.read_text(), at.err.read_text())
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
