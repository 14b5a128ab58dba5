"""`snip threshold`: counts against brute force, a valley that is there, none that is not."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

import snipdedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.evaluation.similarities import BINS, STEPS, find_valley


@pytest.fixture(scope="module")
def two_kinds():
    """600 rows far from all others, and 300 of which each has a near copy."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(900, 24))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = x[600:] + rng.normal(0, 0.04, (300, 24))
    return np.concatenate([x, near]).astype(np.float32), np.r_[np.arange(900), np.arange(600, 900)]


def levels_by(advice):
    return {level["threshold"]: level for level in advice.levels}


def test_all_shares_are_those_of_brute_force(two_kinds, tmp_path):
    rows, labels = two_kinds
    pq.write_table(pa.table({"photo": labels}), tmp_path / "m.parquet")
    np.save(tmp_path / "f.npy", rows)
    advice = snipdedup.suggest_threshold(
        tmp_path / "f.npy", metadata=tmp_path / "m.parquet", same="photo", sample=2000
    )
    table = truth.cosine_table(rows).astype(np.float64)
    np.fill_diagonal(table, -2)
    same = (labels[:, None] == labels) & ~np.eye(len(rows), dtype=bool)
    best = table.argmax(1)
    assert (advice.rows, advice.pool, advice.sample) == (1200, 1200, 1200)
    assert len(advice.levels) > 6
    for t, level in levels_by(advice).items():
        close = table >= t
        matches = close.sum(1)
        assert level["matched"] == pytest.approx((matches > 0).mean(), abs=1e-3)
        assert level["removed"] == pytest.approx((1 - 1 / (1 + matches)).mean(), abs=1e-3)
        assert level["precision"] == pytest.approx(
            (close & same).sum() / max(close.sum(), 1), abs=5e-3
        )
        assert level["recall"] == pytest.approx((close & same).sum() / same.sum(), abs=5e-3)
        some = matches > 0
        right = same[np.arange(1200), best][some].mean() if some.any() else 1
        assert level["right"] == pytest.approx(right, abs=5e-3)
    grid = np.arange(1, 1000) / 1000
    reach, right = (
        len(part) - np.searchsorted(np.sort(part), grid) for part in (table.ravel(), table[same])
    )
    f1 = 2 * right / (reach + same.sum())
    assert levels_by(advice)[advice.suggestion]["f1"] == pytest.approx(max(f1), abs=1e-3)
    assert "best F1" in advice.reason


def test_a_set_worked_by_hand(tmp_path):
    # Angles 0, 20, 30, 90 degrees: cosines .940 and .866 to row 0, .985 between rows 1 and 2.
    angles = np.radians([0, 20, 30, 90])
    np.save(tmp_path / "f.npy", np.stack([np.cos(angles), np.sin(angles)], 1))
    pq.write_table(pa.table({"group": ["a", "a", "b", "b"]}), tmp_path / "m.parquet")
    advice = snipdedup.suggest_threshold(
        tmp_path / "f.npy", metadata=tmp_path / "m.parquet", same="group"
    )
    found = levels_by(advice)[0.99]
    assert (found["matched"], found["removed"], found["recall"]) == (0, 0, 0)
    best = levels_by(advice)[advice.suggestion]
    # the pairs 01 and 23 (.5) are right; all of 01, 02, 12, 23 reach .5, but not 13 (.342)
    assert (best["precision"], best["recall"], best["f1"]) == (0.5, 1, pytest.approx(2 / 3))
    assert 0.343 <= advice.suggestion <= 0.5


def test_a_valley_is_found_between_two_kinds(two_kinds):
    rows, _ = two_kinds
    advice = snipdedup.suggest_threshold(rows)
    table = truth.cosine_table(rows)
    np.fill_diagonal(table, -2)
    highest = np.sort(table.max(1))
    assert highest[600 - 1] < advice.suggestion < highest[600]  # parts the two, exactly
    assert advice.valley == advice.suggestion
    assert "two kinds" in advice.reason
    copies = np.concatenate([rows[:600], rows[:300]])  # exact ones are no second kind
    assert snipdedup.suggest_threshold(copies).suggestion is None


@pytest.mark.parametrize("seed", range(8))
def test_no_valley_is_guessed(seed):
    rng = np.random.default_rng(seed)
    draws = [rng.normal(0.8, 0.05, 2000), rng.uniform(0.5, 0.99, 2000), rng.beta(5, 2, 300)]
    for cosines in draws:
        assert find_valley(((cosines.clip(-1, 0.999) + 1) * STEPS).astype(int)) is None
    both = np.r_[rng.normal(0.6, 0.03, 900), rng.normal(0.9, 0.03, 100)]
    valley = find_valley(((both.clip(-1, 0.999) + 1) * STEPS).astype(int))
    assert 0.66 < valley < 0.85
    assert find_valley(np.full(500, BINS - 1)) is None  # copies only


def test_it_says_that_there_is_no_valley():
    rows = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32)
    advice = snipdedup.suggest_threshold(rows)
    assert (advice.valley, advice.suggestion) == (None, None)
    assert "suggested threshold: none" in str(advice)
    assert "no valley" in advice.reason


def test_a_sample_and_a_pool_are_within_their_error(two_kinds):
    rows, _ = two_kinds
    whole = snipdedup.suggest_threshold(rows)
    some = snipdedup.suggest_threshold(rows, sample=400, seed=1)
    assert (some.sample, some.pool) == (400, 1200)
    for t in levels_by(whole).keys() & levels_by(some).keys():
        a, b = levels_by(whole)[t], levels_by(some)[t]
        assert abs(a["removed"] - b["removed"]) <= 2 * b["error"]
    pooled = snipdedup.suggest_threshold(rows, sample=100, pool=500, seed=1)
    assert (pooled.rows, pooled.pool, pooled.sample) == (1200, 500, 100)
    again = snipdedup.suggest_threshold(rows, sample=100, pool=500, seed=1, threads=1)
    assert str(pooled) == str(again)


def test_bad_rows_are_left_out(two_kinds):
    rows, _ = two_kinds
    worse = np.concatenate([rows, np.full((1, 24), np.nan, np.float32), np.zeros((1, 24), "f4")])
    advice = snipdedup.suggest_threshold(worse)
    assert advice.sample == 1200
    assert advice.levels == snipdedup.suggest_threshold(rows).levels


def test_the_command_prints_and_writes_a_page(two_kinds, tmp_path):
    np.save(tmp_path / "f.npy", two_kinds[0])
    code, out, err = truth.snip("threshold", tmp_path / "f.npy", "--html", tmp_path / "t.html")
    assert (code, err.count("Traceback")) == (0, 0)
    assert "suggested threshold: 0." in out
    page = (tmp_path / "t.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert page.count('class="cursor"') == 2
    assert "nearest neighbours" in page
    code, out, _ = truth.snip("threshold", tmp_path / "f.npy", "--json")
    assert json.loads(out)["suggestion"] == snipdedup.suggest_threshold(two_kinds[0]).suggestion


def test_refusals(two_kinds, tmp_path):
    rows = two_kinds[0]
    np.save(tmp_path / "f.npy", rows)
    pq.write_table(pa.table({"id": np.arange(1200)}), tmp_path / "m.parquet")
    with pytest.raises(SnipError, match="give --metadata too"):
        snipdedup.suggest_threshold(tmp_path / "f.npy", same="id")
    known = {"metadata": tmp_path / "m.parquet"}
    with pytest.raises(SnipError, match="no row of the sample shares its value"):
        snipdedup.suggest_threshold(tmp_path / "f.npy", same="id", **known)
    with pytest.raises((SnipError, UsageError), match="nothing"):
        snipdedup.suggest_threshold(tmp_path / "f.npy", same="nothing", **known)
    with pytest.raises(UsageError, match="sample"):
        snipdedup.suggest_threshold(rows, sample=1)
    with pytest.raises(SnipError, match="two rows"):
        snipdedup.suggest_threshold(np.zeros((3, 4), np.float32))


@pytest.mark.slow
def test_key_frames_have_no_valley_and_copies_their_best_threshold(data):
    frames = snipdedup.suggest_threshold(data / "keyframes" / "img_emb")
    assert frames.suggestion is None
    copies = data / "copies"
    advice = snipdedup.suggest_threshold(
        copies / "features.npy", metadata=copies / "labels.parquet", same="group"
    )
    assert advice.suggestion == pytest.approx(0.761, abs=0.01)  # that of all pairs
