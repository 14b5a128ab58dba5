"""`--max_memory` holds over all who work on a run together, besides the libraries they load."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from snipdedup.features.shards import open_features
from snipdedup.join.pipeline import needed_memory

sys.path.insert(0, str(ROOT / "scripts"))
import timing

IDLE = """
import faiss, torch, pyarrow.parquet, {more}
import snipdedup.deduplication.run
torch.zeros(9) @ torch.zeros(9)
input()
"""
WORKERS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Rows like those of CLIP, a third of them copies."""
    folder = tmp_path_factory.mktemp("rows") / "set"
    words = [sys.executable, ROOT / "scripts" / "synthetic.py", folder, "--rows", "250000"]
    subprocess.run([*words, "--dim", "256", "--heavy", "1"], check=True)
    return folder / "img_emb"


def libraries(more):
    """Return what a process holds that has imported all and done nothing."""
    words = [sys.executable, "-c", IDLE.format(more=more)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as idle:
        held, now = -1, 0
        while held != now or now == 0 or idle_at_start(idle.pid):
            held, now = now, timing.anonymous(idle.pid)
            time.sleep(0.5)
        idle.communicate(b"\n")
    return now


def idle_at_start(pid):
    return "torch" not in Path(f"/proc/{pid}/maps").read_text()


def is_worker(pid):
    """Tell a worker, at a task or not, from what Ray runs besides."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::perform", b"ray::IDLE"))
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_the_least_memory_that_is_allowed_is_held_by_all_together(shards, tmp_path, runner):
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is what Linux tells")
    more = "numpy" if runner == "local" else pytest.importorskip("ray").__name__
    bound = needed_memory(open_features(shards), WORKERS)
    words = [
        sys.executable, "-m", "snipdedup", "dedup", shards, "--out", tmp_path / "out",
        "--runner", runner, "--threads", WORKERS, "--max_memory", bound,
    ]  # fmt: skip
    alone, held, most = libraries(more), 0, 0
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            workers = [pid for pid in timing.tree(run.pid) if is_worker(pid)]
            sizes = [timing.anonymous(pid) for pid in (run.pid, *workers)]
            held = max(held, sum(max(0, size - alone) for size in sizes))
            most = max(most, len(workers))
            time.sleep(0.02)
    assert run.returncode == 0
    assert most >= (WORKERS if runner == "ray" else 0)
    print(f"\n{runner}: {held / 1e6:.0f} of {bound / 1e6:.0f} MB")
    assert held <= bound
