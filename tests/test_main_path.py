"""The page about the main path names what a run calls, in its order."""

from __future__ import annotations

import re
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT

from snipdedup import cli

PAGE = ROOT / "docs" / "internals" / "main_path.md"
PACKAGE = ROOT / "snipdedup"
MOST_FILES = 20


def test_the_main_path_is_what_a_run_calls(tmp_path):
    rows = np.random.default_rng(0).standard_normal((400, 32)).astype(np.float32)
    rows[300:] = rows[:100] + np.float32(0.01)
    np.save(tmp_path / "features.npy", rows)
    pq.write_table(pa.table({"key": [f"{n:03d}" for n in range(400)]}), tmp_path / "meta.parquet")
    steps = re.findall(r"^\| `(.+?\.py)` \| `(\w+)` \|", PAGE.read_text("utf-8"), re.M)
    assert len({file for file, _ in steps}) <= MOST_FILES
    called: dict[tuple[str, str], None] = {}

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            called[path[len(str(PACKAGE)) + 1 :], frame.f_code.co_name] = None

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        words = [tmp_path / "features.npy", "--metadata", tmp_path / "meta.parquet"]
        assert cli.run(["dedup", *map(str, words), "--out", str(tmp_path / "out")]) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    missing = [step for step in steps if step not in called]
    assert not missing
    assert [step for step in called if step in steps] == steps
