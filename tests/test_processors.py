"""The same result from every processor: libraries are told to leave out instructions.

Most products are made by the native kernels, see tests/native; here numpy makes them, so that the
libraries' own instructions count.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import truth

# numpy's, torch's, oneDNN's, OpenBLAS's and MKL's ways to leave out instructions
SETTINGS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "OPENBLAS_CORETYPE": "Prescott"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
    },
    "onednn": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
}

RUN = """
import sys
from unittest import mock
import numpy as np
from snipdedup.deduplication.run import dedup
from snipdedup.join import encoding, hubs, model, tiles

features, out, small = sys.argv[1:]
if small == "small":  # lists, hubs and crowds at sizes that a test can afford
    hubs.HUB_ROWS, model.SINGLE_LIST_ROWS, tiles.CROWDED = 500, 0, 1 / 512
    tiles.ROW_TILE, tiles.COLUMN_TILE = 128, 256
    encoding.task_rows = lambda rows: 2048
dedup(features, out=out, keep_work=True, threshold=0.9)
"""


def run(features: Path, out: Path, size: str, env: dict[str, str]) -> None:
    """Run `snip dedup` in a process of its own, under an environment."""
    words = [sys.executable, "-c", RUN, str(features), str(out), size]
    done = subprocess.run(
        words, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def written(out: Path) -> dict[str, bytes]:
    """Return what a run wrote that says what was found, by name: results, model, codes, edges."""
    names = ["is_dup.npy", "groups.parquet", "forest.parquet"]
    names += [str(path.relative_to(out)) for path in sorted(out.glob("work/encode/*/*.npy"))]
    found = {name: (out / name).read_bytes() for name in names}
    for path in [out / "work" / "model.npz", *sorted(out.glob("work/join/*.npz"))]:
        with np.load(path, allow_pickle=False) as file:
            found |= {f"{path.name} {name}": file[name].tobytes() for name in file.files}
    return found


def crowds(rows: int, dim: int) -> np.ndarray:
    """Hubs of near copies, looser crowds, and many small groups whose cosines lie about .9."""
    rng = np.random.default_rng(5)
    noise = np.repeat([0.1, 0.2, 0.3], rows // 8)[:, None]
    dense = np.repeat(rng.standard_normal((3, dim)), rows // 8, axis=0)
    dense += noise * rng.standard_normal(dense.shape)
    x = np.concatenate([dense, truth.clustered(rows - len(dense), dim, 5)])
    near = rng.choice(rows, (2, rows // 8))
    x[near[1]] = x[near[0]] + 0.33 * rng.standard_normal((len(near[0]), dim))
    return x[rng.permutation(rows)].astype(np.float16)


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Return the names of what differs."""
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def test_every_processor_finds_the_same(tmp_path):
    np.save(tmp_path / "x.npy", crowds(6000, 48))
    run(tmp_path / "x.npy", tmp_path / "own", "small", {})
    own = written(tmp_path / "own")
    assert len(own["model.npz hub_row"]) >= 8
    assert len(own["model.npz centroids"]) > 2 * 64
    assert sum(name.endswith("codes.npy") for name in own) == 3
    for name, env in SETTINGS.items():
        run(tmp_path / "x.npy", tmp_path / name, "small", {"SNIPDEDUP_NATIVE": "numpy", **env})
        assert not differing(own, written(tmp_path / name)), name


@pytest.mark.slow
@pytest.mark.parametrize("dim", [96, 768])
def test_every_processor_finds_the_same_in_a_larger_set(tmp_path, dim):
    np.save(tmp_path / "x.npy", crowds(70_000, dim))
    run(tmp_path / "x.npy", tmp_path / "own", "as it is", {})
    own = written(tmp_path / "own")
    for name, env in SETTINGS.items():
        run(tmp_path / "x.npy", tmp_path / name, "as it is", {"SNIPDEDUP_NATIVE": "numpy", **env})
        assert not differing(own, written(tmp_path / name)), name
