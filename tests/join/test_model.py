"""What a join fits to samples: wide codes where they pay, τ on rows that trained no centroid."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from snipdedup.features.shards import open_features
from snipdedup.join import model as room
from snipdedup.join.calibration import needed_taus
from snipdedup.join.model import (
    choose_projections,
    distinct_places,
    draw_rows,
    sample_distinct,
)
from snipdedup.join.projection import WIDTHS, encode_rows

ROWS = 1 << 20  # of the set that a sample stands for


def near_rows(dim, seed=0):
    """A sample of rows at cosine .8, which narrow codes take for .93."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.2
    rows = 0.775 * rng.standard_normal(dim) + spread * rng.standard_normal((1500, dim))
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    ("free", "threshold", "width"),
    [("pairs", 0.9, None), ("coordinates", 0.95, WIDTHS[1]), ("coordinates", 0.9, WIDTHS[2])],
)
def test_wide_codes_are_those_that_rule_out_more_than_they_cost(free, threshold, width):
    costs = {"PROJECT_NS": 0, "STORE_NS": 0, "WIDE_PAIR_NS": 0}
    if free == "pairs":
        costs = {"PAIR_NS": 0}
    with mock.patch.multiple(room, **costs):
        narrow, wide = choose_projections(near_rows(400), threshold, 0, ROWS, 1)
    assert narrow.width == WIDTHS[0]
    assert (wide and wide.width) == width


def test_rows_of_few_dimensions_get_narrow_codes_only():
    rng = np.random.default_rng(1)
    sample = (rng.standard_normal((3000, 20)) @ rng.standard_normal((20, 300))).astype("f4")
    narrow, wide = choose_projections(sample, 0.95, 0, ROWS, 1)
    assert (narrow.width, wide) == (WIDTHS[0], None)


@pytest.mark.parametrize("least", [1 << 10, 1 << 13])
def test_threads_change_nothing(least):
    """Also where more rows are looked at than directions are found on."""
    sample = near_rows(96)
    with (
        mock.patch.object(room, "DIRECTION_ROWS", least),
        mock.patch.object(room, "PAIR_NS", 10**6),
    ):
        one, two = (choose_projections(sample, 0.9, 3, ROWS, threads) for threads in (1, 2))
    assert one[1] is not None
    for mine, other in zip(one, two, strict=True):
        for name, array in mine.arrays().items():
            assert np.array_equal(array, other.arrays()[name])


def test_a_saved_model_is_the_same_again(tmp_path):
    for cost in (0, 10**6):  # without wide codes, and with them
        with mock.patch.object(room, "PAIR_NS", cost):
            model = room.fit_model(open_features(near_rows(96)), 0.9, 0.99, 0, 1)
        assert (model.wide is not None) == bool(cost)
        model.save(tmp_path / "model.npz")
        again = room.Model.load(tmp_path / "model.npz")
        assert (again.limits, again.widths) == (model.limits, model.widths)
        assert (again.threshold, again.calibration_pairs) == (0.9, model.calibration_pairs)
        rows = near_rows(96, seed=1)
        for mine, other in zip(
            again.sharpest.encode(rows), model.sharpest.encode(rows), strict=True
        ):
            assert np.array_equal(mine, other)


def planted(seed, rows, dim, pairs):
    """Random rows, and the places of pairs: one in ten at cosine .952, the others at .995."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    a, b = rng.permutation(rows)[: 2 * pairs].reshape(2, -1)
    noise = rng.standard_normal((pairs, dim))
    noise -= (noise * x[a]).sum(1, keepdims=True) * x[a]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosine = np.where(np.arange(pairs) % 10, 0.995, 0.952)[:, None]
    x[b] = cosine * x[a] + np.sqrt(1 - cosine**2) * noise
    return x.astype(np.float32), a, b


@pytest.mark.parametrize("rows", [3000, 12_000])
def test_centroids_are_trained_on_other_rows_than_tau_is_calibrated_on(rows, monkeypatch):
    """Where the sample is all of the set too: then some rows leave it."""
    used = {}

    def spy(name):
        real = getattr(room, name)

        def record(codes, *given):
            used[name] = {code.tobytes() for code in codes}
            return real(codes, *given)

        monkeypatch.setattr(room, name, record)

    spy("train_centroids")
    spy("calibrate_tau")
    monkeypatch.setattr(room, "SINGLE_LIST_ROWS", 0)
    monkeypatch.setattr(room, "CALIBRATION_ROWS", (4000, 4000))
    x = planted(0, rows, 40, 100)[0]
    monkeypatch.setattr(room, "list_count", lambda rows: 30)
    model = room.fit_model(open_features(x), 0.95, 0.999, 0, 2)
    assert model.lists.nlist == 30
    assert not used["train_centroids"] & used["calibrate_tau"]
    assert len(used["train_centroids"]) == min(48 * 30, rows // 2)
    assert len(used["calibrate_tau"]) == min(4000, rows - 48 * 30)


def test_the_promise_is_kept_where_a_sample_holds_few_pairs(monkeypatch):
    """Some 25 of 2,500, of which one in ten is hard: often the sample holds none of these."""
    monkeypatch.setattr(room, "SINGLE_LIST_ROWS", 0)
    monkeypatch.setattr(room, "CALIBRATION_ROWS", (2000, 2000))
    met = []
    for seed in range(8):
        x, a, b = planted(seed, 20_000, 32, 2500)
        model = room.fit_model(open_features(x), 0.95, 0.999, seed, 2)
        assert model.lists.nlist > 80
        codes = encode_rows(model.narrow, np.concatenate([x[a], x[b]]), 2).values
        places = np.arange(len(a))
        need = needed_taus(codes, model.lists.centroids, places, places + len(a), 2).min(1)
        met.append(np.mean(need <= model.lists.tau))
    assert np.mean(met) >= 0.999
    assert min(met) >= 0.998


def test_rows_are_drawn_from_those_not_taken():
    rng = np.random.default_rng(0)
    taken = np.arange(0, 1000, 3)
    some = draw_rows(1000, 100, rng, taken)
    assert len(some) == 100
    assert (np.diff(some) > 0).all()
    assert (some % 3 > 0).all()
    assert (
        draw_rows(1000, 900, rng, taken).tolist() == np.setdiff1d(np.arange(1000), taken).tolist()
    )
    assert draw_rows(7, 7, rng).tolist() == list(range(7))


def test_a_sample_holds_each_row_once_and_none_that_cannot_be_compared():
    rows = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [np.nan, 1], [0, 0]], np.float32)
    numbers, sample = sample_distinct(open_features(rows), 100, 0, 2)
    assert sorted(numbers.tolist()) == [0, 1, 3]
    assert np.array_equal(sample, rows[numbers])


def test_rows_of_one_hash_are_compared(monkeypatch):
    """Different rows stay, of equal ones the first."""
    monkeypatch.setattr(room, "row_hashes", lambda rows: np.full(len(rows), 5, np.uint64))
    rows = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [np.nan, 1]], np.float32)
    numbers, sample = sample_distinct(open_features(rows), 100, 0, 2)
    assert sorted(numbers.tolist()) == [0, 1, 3]
    assert np.array_equal(sample, rows[numbers])
    hashes = np.array([1, 1, 1, 2, 2], np.uint64)
    assert distinct_places(rows, hashes, np.array([4, 1, 0, 3, 2])).tolist() == [0, 1, 2, 3]
