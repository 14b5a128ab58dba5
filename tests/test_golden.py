"""The comparison of two versions' results sees what counts, and no more."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
golden = importlib.import_module("golden")


@pytest.fixture
def sides(tmp_path):
    """Two folders whose files differ in their own paths and in times only."""
    for name, seconds in (("one", 1.5), ("two", 2.25)):
        side = tmp_path / name
        (side / "out").mkdir(parents=True)
        np.save(side / "out" / "is_dup.npy", np.arange(5) > 2)
        manifest = {
            "settings": {"out": f"{side}/out", "seed": 0},
            "seconds": {"fit": seconds},
            "outputs": {"a.json": {"sha256": name}, "is_dup.npy": {"sha256": "same"}},
        }
        (side / "out" / "snip.json").write_text(json.dumps(manifest))
        (side / "printed.txt").write_text(f"5 rows\nseconds: fit {seconds}\nwritten to {side}/out")
    return tmp_path / "one", tmp_path / "two"


def test_times_and_the_paths_of_the_sides_are_no_differences(sides):
    assert list(golden.differences(*sides)) == []


def test_a_changed_bit_a_missing_file_and_another_setting_are_named(sides):
    one, two = sides
    np.save(two / "out" / "is_dup.npy", np.arange(5) > 1)
    manifest = json.loads((two / "out" / "snip.json").read_text())
    manifest["settings"]["seed"] = 1
    (two / "out" / "snip.json").write_text(json.dumps(manifest))
    (one / "out" / "groups.parquet").write_bytes(b"")
    found = list(golden.differences(one, two))
    assert [line.partition(":")[0] for line in found] == [
        "out/groups.parquet", "out/is_dup.npy", "out/snip.json settings seed",
    ]  # fmt: skip
    assert found[0].endswith("not in two")
    assert found[2].endswith("0 and 1")


def test_the_inputs_hold_copies_near_copies_and_matching_tables(tmp_path):
    golden.make_inputs(tmp_path / "inputs")
    rows = np.load(tmp_path / "inputs" / "small" / "img_emb" / "img_emb_0000.npy")
    assert rows.shape == (3000, 96)
    assert len(np.unique(rows, axis=0)) < 3000
    tables = list((tmp_path / "inputs" / "small" / "metadata").iterdir())
    assert len(tables) == 3
