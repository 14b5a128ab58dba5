"""snip plan and --dry_run: the law of growth, what they refuse, that they leave nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import truth

from snipdedup import planning
from snipdedup.features.shards import open_features
from snipdedup.planning import Machines, Rates, amount, estimate, load_rates, span

# Most are 1 of something, so that sums can be worked by hand.
RATES = Rates(
    dim=100, itemsize=2, width=64, wide=256,
    fit=1e-5, row=1e-6, row_list=1e-9, product=1e-10, proof=1e-6, machine=0.0,
    lists=500, visits=3.0, uneven=1.0, false_pairs=0.0,
    crowded_pairs=0.0, duplicates=0.3,
)  # fmt: skip
GB = 10**9


@pytest.fixture
def roots(monkeypatch):
    """As many lists as the root of the rows, and visits that stay: round numbers."""
    monkeypatch.setattr(planning, "list_count", lambda rows: round(rows**0.5))
    monkeypatch.setattr(planning, "VISIT_GROWTH", 0)


def million(rates=RATES, rows=10**6, cores=2, memory=16 * GB, **more):
    return estimate(rates, rows, Machines(cores, memory, **more))


def test_a_million_rows_worked_by_hand(roots):
    found = million()
    assert (found.lists, found.visits) == (1000, 3.0)
    compute = found.compute
    k_means = 8 * 48_000 * 1000 * 1e-9
    assert compute["fit"] == pytest.approx(1e-5 * (32_768 + 48_000) + k_means)
    assert compute["encode"] == pytest.approx(1e6 * (1e-6 + 1000 * 1e-9))
    # each list: 1000 rows live there, are compared with one another, and with those who visit
    products = 1000 * (3e6 - 5e5) * 1e-10
    assert compute["join"] == pytest.approx(products + 2 * 1.25 * 300_000 * 1e-6)
    assert found.seconds["join"] == pytest.approx(compute["join"] / 1.75)
    assert found.out == pytest.approx(1e6 + 300_000 * 18 + 531_000 * 24)
    work = 1e6 * 328 + 3e6 * 8 + 8e6 + 16 * 31 * 1001 + 40 * 300_000
    assert found.disk == pytest.approx(found.out + work)


def test_constants_count_with_the_speed_of_the_machine():
    slow = million(RATES._replace(machine=2.0))
    assert slow.compute["start"] == 2 * planning.START_S
    assert slow.compute["group"] == pytest.approx(2 * 531_000 * planning.GROUP_S)


def test_of_many_rows_four_bytes_are_held_and_eight_above_2_32():
    for rows, each in ((2_100_000_000, 4), (5_850_000_000, 8)):
        assert each * rows < million(rows=rows).memory < each * rows + 2 * GB


@pytest.mark.parametrize("rows", [1000, 50_000, 70_000, 10**6, 4 * 10**6, 10**8, 2 * 10**9, 10**10])
def test_more_rows_are_never_cheaper(rows):
    less, more = million(rows=rows), million(rows=round(rows * 1.1))
    assert less.disk < more.disk
    assert less.out < more.out
    for stage, seconds in less.compute.items():
        assert seconds <= more.compute[stage], stage


def test_encode_and_join_grow_as_rows_to_the_power_of_one_and_a_half(roots):
    some, many = (million(rows=n).compute for n in (4 * 10**12, 16 * 10**12))
    assert some["encode"] * 7.9 < many["encode"] < some["encode"] * 8
    assert some["join"] * 7.9 < many["join"] < some["join"] * 8


def test_machines_share_encode_and_join_and_a_slow_disk_is_waited_for():
    one, four = million().seconds, million(nodes=4).seconds
    assert four["encode"] == pytest.approx(one["encode"] / 4)
    assert four["group"] == one["group"]
    slow = million(disk_speed=10**6).seconds
    moved = 1e6 * 200 + 1e6 * 328 + million().visits * 1e6 * 8
    assert slow["encode"] == pytest.approx(moved / 1e6)


def test_codes_beyond_memory_are_read_for_each_partition():
    few, many = (million(disk_speed=10**6, max_memory=size) for size in (2 * GB, 300_000_000))
    assert few.seconds["encode"] == many.seconds["encode"]
    assert many.partitions > 2 * few.partitions
    assert many.seconds["join"] - few.seconds["join"] > 0.8 * 328 * (many.partitions / 3 - 1)


def test_few_rows_have_one_list():
    found = million(rows=60_000)
    assert (found.lists, found.visits, found.partitions) == (1, 1.0, 1)
    proofs = 2 * 1.25 * 18_000 * 1e-6
    assert found.compute["join"] == pytest.approx(60_000**2 / 2 * 1e-10 + proofs)


# ---- the command


def told(*words):
    """What a command prints, which must end well."""
    status, out, err = truth.snip(*words)
    assert status == 0, err
    return out


@pytest.fixture
def rates(tmp_path):
    """A file of rates."""
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"kind": "rates", **RATES._asdict(), "dim": 768}))
    return path


def test_a_plan_of_two_billion_rows(rates):
    said = told("plan", "--rows", "2.1e9", "--cores", "16", "--memory", "32GB", "--rates", rates)
    assert said.startswith("2,100,000,000 rows × 768, 30% of them removed; 16 cores, 32 GB")
    assert "lists 45,826, each row in" in said
    assert said.endswith("it fits\n")
    large = told("plan", "--rows", "5.85e9", "--cores", "16", "--memory", "32GB", "--rates", rates)
    assert "memory: " in large  # eight bytes a row
    assert "larger machine" in large
    body = json.loads(
        told("plan", "--rows", "2.1e9", "--rates", rates, "--json", "--duplicates", ".5")
    )
    assert body["rows"] == 2_100_000_000
    assert body["duplicates"] == 0.5
    assert body["problems"] == []


def test_what_does_not_fit_is_said(rates):
    small = ("plan", "--rows", "1e6", "--rates", rates, "--memory", "64GB", "--cores", "2")
    assert "it fits" in told(*small)
    assert "disk: the run needs" in told(*small, "--disk", "100MB")
    assert "--max_memory: the run needs at least" in told(*small, "--max_memory", "50MB")
    assert "memory: " in told("plan", "--rows", "1e6", "--rates", rates, "--memory", "250MB")


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
        (lambda v: v.pop("proof"), "proof is None"),
        (lambda v: v.update(proof="1"), "proof is '1'"),
        (lambda v: v.update(dim=512), "512, not 768"),
        (lambda v: v.update(row=-1), "row is -1"),
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


def test_a_probe_looks_at_as_many_rows_of_any_large_set():
    """So it takes as many seconds: fewer than ten on two cores."""
    samples = [planning.sample_of_set(None, rows, 8, 0) for rows in (10**8, 2_100_000_000)]
    assert [len(raw) for raw in samples] == [planning.SAMPLE_ROWS] * 2
    assert planning.SAMPLE_ROWS <= 1 << 17


def test_a_probe_is_written_and_read_back(tmp_path):
    path = tmp_path / "new.json"
    words = ("plan", "--rows", "2.1e9", "--dim", "64", "--rates", path)
    first = told(*words, "--probe")
    found = load_rates(path, 64)
    assert found.duplicates == 0.3
    assert found.lists > 100
    assert 1 < found.visits < 10
    for name in ("fit", "row", "row_list", "product", "proof", "machine"):
        assert getattr(found, name) > 0, name
    assert told(*words) == first


def test_a_dry_run_tells_the_cost_and_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "img_emb"
    folder.mkdir()
    x = truth.clustered(6000, 32, 0, copies=0.1, dtype=np.float16)
    np.save(folder / "img_emb_0000.npy", x)
    np.save(tmp_path / "x.npy", np.eye(3, 8, dtype=np.float32))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(planning.tempfile, "tempdir", str(tmp_path / "tmp"))
    before = sorted(tmp_path.rglob("*"))
    said = told("dedup", folder, "--out", tmp_path / "out", "--dry_run")
    assert said.startswith("6,000 rows × 32")
    assert "it fits" in said
    assert told("plan", tmp_path / "x.npy").startswith("3 rows × 8")  # too few to be a sample
    assert sorted(tmp_path.rglob("*")) == before
    status, _, err = truth.snip("dedup", folder, "--dry_run", "--method", "exact")
    assert status == 2
    assert "--dry_run plans a join" in err
    assert truth.snip("dedup", folder, "--out", folder / "out", "--dry_run")[0] == 1


def test_the_share_that_is_removed_is_estimated_from_pairs_in_the_sample():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40_000, 24)).astype(np.float16)
    copy, of = rng.permutation(40_000).reshape(2, -1)[:, :10_000]
    x[copy] = x[of]
    x[copy[:5000]] += (0.03 * rng.standard_normal((5000, 24))).astype(np.float16)
    found = planning.probe(open_features(x), 40_000, 24, 0.95, 0.999, 0)
    assert found.duplicates == pytest.approx(0.25, rel=0.2)


def test_amounts_and_spans_are_those_a_person_says():
    assert [amount(x) for x in (12, 2.5e6, 3.2e10, 1.5e12, 2e15)] == [
        "12 bytes", "2.5 MB", "32 GB", "1.5 TB", "2,000 TB",
    ]  # fmt: skip
    assert [span(x) for x in (1.25, 89, 91, 6000, 200_000)] == [
        "1.2 s", "89.0 s", "1.5 min", "1.7 h", "2.3 d",
    ]  # fmt: skip
