"""Sets for benchmarks have the structure that scripts promise, and each time the same bits."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from truth import save_shards

SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))
dense, synthetic = (importlib.import_module(name) for name in ("dense", "synthetic"))


def run(script, *words, **environment):
    """Run a script; return its status and what it printed last."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def load(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("img_emb/*.npy"))])


def bits(folder):
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("img_emb/*"))]


def cosines(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """5,000 rows in 40 dimensions, far from isotropic, of any length, in two shards."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5000, 40)) * np.arange(1, 41) ** -0.7 + 0.3) * 3
    folder = tmp_path_factory.mktemp("real")
    save_shards(folder, x.astype(np.float32), [1800])
    return folder, x.astype(np.float32)


@pytest.fixture(scope="module")
def made(real, tmp_path_factory):
    """The folder of a dense set of 20,000 rows, and what each row shows."""
    folder = tmp_path_factory.mktemp("dense")
    status, said = run("dense.py", real[0], folder, "--times", 4, "--seed", 3)
    assert status == 0, said
    assert "20,000 of 20,000 rows" in said
    return folder, dense.source_rows(5000, 4, 3)


def test_copies_of_a_dense_set_lie_at_the_cosines_asked(real, made):
    (_, x), (folder, source) = real, made
    rows = load(folder)
    assert rows.shape == (20_000, 40)
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(np.bincount(source), np.full(5000, 4))
    assert np.mean(np.diff(source) == 0) < 0.01  # in no order
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)
    cosine = cosines(rows, x[source])
    near = np.isclose(cosine, 0.985, atol=2e-4)
    assert near.sum() == 5000
    assert 0.9 - 2e-4 < cosine[~near].min() < 0.902
    assert 0.948 < cosine[~near].max() < 0.95 + 2e-4
    assert cosine[~near].mean() == pytest.approx(0.925, abs=5e-4)


def test_noise_of_a_dense_set_has_the_shape_of_the_set(real, made):
    (_, x), (folder, source) = real, made
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    rows = load(folder).astype(np.float64)
    noise = rows - cosines(rows, x[source])[:, None] * unit[source]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert abs((noise * unit[source]).sum(axis=1)).max() < 1e-2
    rng = np.random.default_rng(9)
    plain = rng.multivariate_normal(np.zeros(40), np.cov(unit.T), len(rows))
    plain -= (plain * unit[source]).sum(axis=1, keepdims=True) * unit[source]
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    wanted, found = np.cov(plain.T), np.cov(noise.T)
    np.testing.assert_allclose(found, wanted, atol=0.01 * wanted.max())
    assert found[0, 0] / found[-1, -1] > 10


def test_a_dense_set_has_the_same_bits_on_other_kernels_and_threads(real, made, tmp_path):
    words = (real[0], tmp_path, "--times", 4, "--seed", 3)
    assert run("dense.py", *words, OPENBLAS_CORETYPE="Prescott", OPENBLAS_NUM_THREADS="1")[0] == 0
    assert bits(tmp_path) == bits(made[0])
    status, said = run("dense.py", *words)
    assert status == 1
    assert "exists" in said


def test_a_dense_set_goes_on_over_shards_and_takes_other_cosines(real, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "SHARD_ROWS", 3000)
    monkeypatch.setattr(dense, "BLOCK", 700)
    words = [str(real[0]), str(tmp_path), "--times", "2", "--noise", ".99", ".8", ".81"]
    dense.main(words)
    shards = sorted(tmp_path.glob("img_emb/*.npy"))
    assert [path.name for path in shards] == [f"img_emb_{n:04d}.npy" for n in range(4)]
    assert [len(np.load(path)) for path in shards] == [3000, 3000, 3000, 1000]
    cosine = cosines(load(tmp_path), real[1][dense.source_rows(5000, 2, 0)])
    assert np.isclose(cosine, 0.99, atol=2e-4).sum() == 2500
    assert np.sort(cosine)[:7500].max() < 0.8102


def test_a_row_without_direction_is_refused(tmp_path):
    save_shards(tmp_path / "zero", np.eye(9, 8, dtype=np.float32), [])
    status, said = run("dense.py", tmp_path / "zero", tmp_path)
    assert status == 1
    assert "rows 0 to 9: zero or not finite" in said


@pytest.mark.parametrize(
    ("flags", "row", "last"),
    [
        ((), [-0.12408, -0.40649, 0.02168], -0.06064),
        (("--spectrum", "flat"), [0.11981, -0.26758, 0.54297], -0.2905),
    ],
)
def test_older_synthetic_sets_stay_as_they_were(tmp_path, flags, row, last):
    assert run("synthetic.py", tmp_path, "--rows", 3000, "--dim", 24, *flags)[0] == 0
    rows = load(tmp_path)
    np.testing.assert_allclose([*rows[1234, :3], rows[2999, -1]], [*row, last], atol=2e-4)


@pytest.mark.parametrize("dim", [96, 256])
def test_a_hierarchical_set_has_structure(tmp_path, dim):
    words = ("--rows", 20_000, "--dim", dim, "--spectrum", "hierarchical", "--heavy_copies", 300)
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        assert run("synthetic.py", folder, *words)[0] == 0
    assert bits(folders[0]) == bits(folders[1])
    rows = load(folders[0])
    assert rows.shape == (20_000, dim)
    assert rows.dtype == np.float16
    mean = rows.astype(np.float64).mean(axis=0)
    assert 0.2 < mean @ mean < 0.4
    spectrum = np.linalg.eigvalsh(np.cov(rows.astype(np.float32).T))[::-1]
    assert spectrum[: dim // 8].sum() > 0.4 * spectrum.sum()

    options = synthetic.parse([str(tmp_path), *map(str, words)])
    source, noise = synthetic.plan_groups(options)
    copies = source != np.arange(20_000)
    assert copies.sum() == 6000
    assert (noise[copies] == 0).sum() == pytest.approx(2000, rel=0.1)
    cosine = cosines(rows[copies], rows[source[copies]])
    np.testing.assert_allclose(cosine, 1 / np.sqrt(1 + noise[copies] ** 2), atol=5e-4)
    assert cosine.min() < 0.91
    assert 0.05 < np.mean(cosine < 0.95) < 0.3
    sizes = np.sort(np.bincount(source[copies]))[::-1]
    assert sizes[0] == 300
    assert 30 < sizes[9] < 300
    assert (sizes == 1).sum() > 500
