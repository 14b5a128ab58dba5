"""Whole results are the same, byte for byte, whichever kernels found them."""

from __future__ import annotations

import importlib
import json
import sys
from unittest import mock

import numpy as np
import pytest
import truth
from conftest import ROOT

from snipdedup import native
from snipdedup.groups import star
from snipdedup.join import encoding, hubs, model, tiles

sys.path.append(str(ROOT / "scripts"))
golden = importlib.import_module("golden")


@pytest.fixture(autouse=True)
def _small_lists():
    """Lists, hubs, crowded tiles and huge groups at sizes that a test can afford."""
    with (
        mock.patch.object(hubs, "HUB_ROWS", 300),
        mock.patch.object(model, "SINGLE_LIST_ROWS", 0),
        mock.patch.multiple(tiles, ROW_TILE=128, COLUMN_TILE=256, CROWDED=1 / 64),
        mock.patch.object(star, "TABLE_GROUP", 600),
        mock.patch.object(encoding, "task_rows", return_value=1024),
    ):
        yield


def features(dtype, *, crowd=False):
    """Small groups with near and exact copies; if asked, beside crowds of near copies."""
    rng = np.random.default_rng(7)
    parts = [golden.planted(rng, 1200, 40)]
    if crowd:
        for spread in (0.05, 0.1, 0.2):
            centre = rng.standard_normal(40)
            parts.append(centre + spread * rng.standard_normal((450, 40)))
    x = rng.permutation(np.concatenate(parts))
    x *= rng.uniform(0.1, 30, (len(x), 1))
    return x.astype(dtype)


CASES = {
    "float16": (np.float16, {}, ()),
    "float64": (np.float64, {}, ("--keep", "random", "--pairs")),
    "hubs": (np.float32, {"crowd": True}, ("--threshold", ".93")),
    "crowds": (np.float16, {"crowd": True}, ("--threshold", ".97", "--recall", "1")),
    "reference": (np.float32, {"crowd": True}, ("--reference", "reference.npy")),
    "references only": (
        np.float16, {"crowd": True}, ("--reference", "reference.npy", "--references_only"),
    ),
    "components": (np.float32, {"crowd": True}, ("--grouping", "components")),
    "exact": (np.float32, {}, ("--method", "exact", "--keep_fraction", ".8")),
    "semdedup": (np.float16, {}, ("--method", "semdedup", "--clusters", "5")),
}  # fmt: skip
WIDE = "crowds", "reference", "float64"


@pytest.mark.parametrize("case", CASES)
def test_every_set_of_kernels_writes_the_same(case, tmp_path, monkeypatch):
    dtype, kind, more = CASES[case]
    x = features(dtype, **kind)
    np.save(tmp_path / "reference.npy", x[: len(x) // 3])
    truth.save_shards(tmp_path / "x", x[len(x) // 3 if "--reference" in more else 0 :], [300, 500])
    if case in WIDE:  # as where a pair costs more than wide codes of all rows
        monkeypatch.setattr(model, "PAIR_NS", 10**6)
    before = native.used()
    for name in native.names():
        native.use(name)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        words = [f"../{word}" if word.endswith(".npy") else word for word in more]
        status, _, said = truth.snip(
            "dedup", "../x", "--out", "out", "--keep_work", "--threads", "1", *words
        )
        assert status == 0, said
    native.use(before)
    own = tmp_path / "numpy"
    for name in native.names()[:-1]:
        found = [line for line in golden.differences(own, tmp_path / name) if "kernel" not in line]
        assert not found, name
    manifest = json.loads((own / "out" / "snip.json").read_text())
    assert manifest["counts"]["removed"] > 200
    if case == "hubs":
        assert manifest["method"]["masses"] >= 2
    if case in WIDE:
        assert manifest["method"]["widths"][1] > 0
