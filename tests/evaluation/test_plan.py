"""snip plan and --dry_run: what they say, what they refuse, that they leave nothing behind."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import truth

from snipdedup.evaluation import plan, probe
from snipdedup.evaluation.costs import Rates
from snipdedup.evaluation.plan import amount, load_rates, span
from snipdedup.join import model


@pytest.fixture
def rates(tmp_path):
    """A file of rates."""
    values = {
        field.name: [500.0, 2000.0] if field.name == "lists" else 1e-7
        for field in dataclasses.fields(Rates)
    }
    values |= {"dim": 768, "itemsize": 2, "width": 128, "visits": [4.0, 5.0], "uneven": 1.0}
    values |= {"visit_bytes": 140.0, "edge_bytes": 20.0, "member_bytes": 30.0, "base": 2e8}
    values |= {"gain": 0.7, "duplicates": 0.25, "false_pairs": 0.0, "crowded_pairs": 0.0}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(values))
    return path


def told(*words):
    """What a command prints, which must end well."""
    status, out, err = truth.snip(*words)
    assert status == 0, err
    return out


@pytest.fixture
def quick(monkeypatch):
    """A probe of few rows: what it says is nonsense, how it goes is the same."""
    monkeypatch.setattr(probe, "HASHES", 1 << 12)
    monkeypatch.setattr(probe, "EDGES", 1 << 10)
    monkeypatch.setattr(probe, "PROOFS", 1 << 9)
    monkeypatch.setattr(probe, "POOL", 1 << 13)
    monkeypatch.setattr(probe, "PAIR_ROWS", 1 << 13)
    monkeypatch.setattr(model, "CALIBRATION_ROWS", (1 << 12, 1 << 12))
    monkeypatch.setattr(probe, "MOST_LISTS", 1 << 6)


def test_a_plan_of_two_billion_rows(rates):
    said = told("plan", "--rows", "2.1e9", "--cores", "16", "--memory", "32GB", "--rates", rates)
    assert said.startswith("2,100,000,000 rows × 768, 25% of them go; 16 cores, 32 GB")
    assert f"lists {model.list_count(2_100_000_000):,}, each row in" in said
    assert said.endswith("it fits\n")
    large = told("plan", "--rows", "5.85e9", "--cores", "16", "--memory", "32GB", "--rates", rates)
    assert "memory: " in large  # eight bytes a row
    assert "larger machine" in large
    body = json.loads(
        told("plan", "--rows", "2.1e9", "--rates", rates, "--json", "--duplicates", ".5")
    )
    assert body["job"]["rows"] == 2_100_000_000
    assert body["job"]["duplicates"] == 0.5
    assert body["seconds"] == pytest.approx(sum(s["seconds"] for s in body["stages"].values()))


def test_what_does_not_fit_is_said(rates):
    small = ("plan", "--rows", "1e6", "--rates", rates, "--memory", "64GB")
    assert "it fits" in told(*small)
    assert "disk: " in told(*small, "--disk", "100MB")
    assert "memory: " in told("plan", "--rows", "1e6", "--rates", rates, "--memory", "250MB")


def test_a_set_too_small_to_be_sampled_has_a_plan(tmp_path, quick):
    np.save(tmp_path / "x.npy", np.eye(3, 8, dtype=np.float32))
    assert told("plan", tmp_path / "x.npy").startswith("3 rows × 8")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "give FEATURES or --rows"),
        (["--rows", "0"], 2, "--rows must lie between"),
        (["--rows", "1e6", "--memory", "much"], 2, "memory"),
        (["--rows", "1e6", "--rates", "nowhere.json"], 1, "nowhere.json"),
        (["nowhere"], 1, "nowhere"),
    ],
)
def test_refusals(tmp_path, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    found, _, err = truth.snip("plan", *words)
    assert found == status
    assert said in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("gain"), "gain"),
        (lambda v: v.update(gain="1"), "gain"),
        (lambda v: v.update(visits=[1.0, None]), "visits"),
        (lambda v: v.update(dim=512), "512"),
        (lambda v: v.update(row=-1), "row"),
    ],
)
def test_rates_that_are_none_are_refused(rates, change, said):
    values = json.loads(rates.read_text())
    change(values)
    rates.write_text(json.dumps(values))
    status, _, err = truth.snip("plan", "--rows", "1e6", "--rates", rates)
    assert status == 1
    assert said in err
    assert str(rates) in err


def test_a_probe_is_written_and_read_back(tmp_path, quick):
    path = tmp_path / "new.json"
    first = told("plan", "--rows", "1e5", "--dim", "32", "--rates", path, "--probe")
    found, share = load_rates(path)
    assert share == 0.3
    assert found.dim == 32
    assert found.visit_bytes == pytest.approx(found.width + 12, rel=0.1)
    for field in dataclasses.fields(Rates):
        value = getattr(found, field.name)
        assert np.all(np.isfinite(value)), field.name
    assert found.product > 0
    assert found.row > 0
    assert told("plan", "--rows", "1e5", "--dim", "32", "--rates", path) == first


def test_a_dry_run_tells_the_cost_and_leaves_nothing(tmp_path, quick, monkeypatch):
    folder = tmp_path / "img_emb"
    folder.mkdir()
    x = truth.clustered(6000, 32, 0, copies=0.1, dtype=np.float16)
    np.save(folder / "img_emb_0000.npy", x)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(probe.tempfile, "tempdir", str(tmp_path / "tmp"))
    before = sorted(tmp_path.rglob("*"))
    said = told("dedup", folder, "--out", tmp_path / "out", "--dry_run")
    assert said.startswith("6,000 rows × 32")
    assert "it fits" in said
    assert sorted(tmp_path.rglob("*")) == before
    status, _, err = truth.snip("dedup", folder, "--dry_run", "--method", "exact")
    assert status == 2
    assert "--dry_run plans a join" in err
    assert truth.snip("dedup", folder, "--out", folder / "out", "--dry_run")[0] == 1


def test_the_share_that_goes_is_estimated_from_pairs_in_the_sample(quick):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40_000, 24)).astype(np.float16)
    copy, of = rng.permutation(40_000).reshape(2, -1)[:, :10_000]
    x[copy] = x[of]
    x[copy[:5000]] += (0.03 * rng.standard_normal((5000, 24))).astype(np.float16)
    _, share = probe.probe(
        plan.open_features(x), rows=40_000, dim=24, duplicates=None, threshold=0.95,
        recall=0.999, seed=0, threads=1,
    )  # fmt: skip
    assert share == pytest.approx(0.25, rel=0.2)


def test_amounts_and_spans_are_those_a_person_says():
    assert [amount(x) for x in (12, 2.5e6, 3.2e10, 1.5e12, 2e15)] == [
        "12 bytes", "2.5 MB", "32 GB", "1.5 TB", "2,000 TB",
    ]  # fmt: skip
    assert [span(x) for x in (1.25, 89, 91, 6000, 200_000)] == [
        "1.2 s", "89.0 s", "1.5 min", "1.7 h", "2.3 d",
    ]  # fmt: skip
