"""Hubs: near copies that are not compared with one another are joined all the same."""

from __future__ import annotations

import dataclasses
import time
from unittest import mock

import numpy as np
import pytest
import truth

from snipdedup.deduplication.run import dedup
from snipdedup.errors import DamagedError
from snipdedup.features.shards import open_features
from snipdedup.join import encoding, hubs, model, tasks
from snipdedup.join.hubs import find_hubs
from snipdedup.join.projection import fit_projection


def ball(rng, rows, centre, radius):
    """Rows at about one angle around a centre, so at about twice its square from one another."""
    away = rng.standard_normal((rows, len(centre)))
    return centre + radius * away / np.linalg.norm(away, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def rows():
    """Three crowds of near copies, two of which touch; a halo around one; 4,000 small groups."""
    rng = np.random.default_rng(3)
    one, two = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 24)))
    beside = np.cos(0.7) * one + np.sin(0.7) * two  # 40 degrees away
    halo = [ball(rng, 30, one, radius) for radius in np.linspace(0.2, 0.6, 25)]
    x = np.concatenate([
        ball(rng, 3000, one, 0.1), ball(rng, 1500, beside, 0.12), *halo,
        ball(rng, 2500, -two, 0.1), truth.clustered(8000, 24, 5),
    ])  # fmt: skip
    return x[rng.permutation(len(x))].astype(np.float32)


@pytest.fixture
def small_hubs():
    """Hubs and lists at sizes that a test can afford."""
    with (
        mock.patch.object(hubs, "HUB_ROWS", 500),
        mock.patch.object(model, "SINGLE_LIST_ROWS", 0),
        mock.patch.object(encoding, "task_rows", return_value=2048),
    ):
        yield


@pytest.mark.usefixtures("small_hubs")
def test_components_are_those_of_brute_force(rows):
    brute = dedup(rows, method="exact", grouping="components")
    found = dedup(rows, grouping="components", recall=1)
    assert found.search.notes["masses"] >= 3
    assert found.search.notes["visits"] < 12 * len(rows)
    assert np.array_equal(found.is_dup, brute.is_dup)
    assert np.array_equal(found.members.group, brute.members.group)
    forest = found.search.whole_forest
    cosine = truth.cosine_table(rows[np.unique(np.concatenate([forest.a, forest.b]))])
    place = np.searchsorted(np.unique(np.concatenate([forest.a, forest.b])), [forest.a, forest.b])
    assert np.array_equal(forest.similarity, cosine[place[0], place[1]])


@pytest.mark.usefixtures("small_hubs")
def test_crowds_whose_hubs_are_a_pair_are_one_group():
    """Rows of one do not visit the other's lists: the edge between the hubs joins them."""
    rng = np.random.default_rng(1)
    one, across = np.linalg.qr(rng.standard_normal((24, 2)))[0].T
    beside = np.cos(0.28) * one + np.sin(0.28) * across  # 16 degrees away, nearly as far as a pair
    crowds = [ball(rng, 2000, centre, 0.05) for centre in (one, beside)]
    parts = [*crowds, truth.clustered(4000, 24, 5)]
    x = rng.permutation(np.concatenate(parts)).astype(np.float32)
    brute = dedup(x, method="exact", grouping="components")
    found = dedup(x, grouping="components", recall=1)
    assert found.search.notes["masses"] >= 2
    assert np.array_equal(found.members.group, brute.members.group)


@pytest.mark.usefixtures("small_hubs")
def test_without_crowdsnothing_changes(rows):
    few = rows[:3000]
    with mock.patch.object(hubs, "HUB_ROWS", 10**6):
        without = dedup(few)
    assert without.search.notes["masses"] == 0


@pytest.mark.usefixtures("small_hubs")
def test_a_hub_may_be_a_copy(rows):
    """Every row comes twice, so about half the sampled hubs copy an earlier row."""
    twice = np.concatenate([rows, rows])
    brute = dedup(twice, method="exact", grouping="components")
    for seed in range(3):
        found = dedup(twice, grouping="components", recall=1, seed=seed)
        assert found.search.notes["masses"] >= 3
        assert np.array_equal(found.is_dup, brute.is_dup)


def test_where_rows_are_placed(rows):
    with mock.patch.object(hubs, "HUB_ROWS", 500):
        projection = fit_projection(rows, 128, 0)
        codes, falls = projection.encode(rows)
        table = find_hubs(
            np.arange(len(rows)), rows, codes, projection,
            threshold=0.95, total=len(rows), threads=1,
        )  # fmt: skip
    placed = table.place(codes, falls, rows)
    cosine = truth.cosine_table(np.concatenate([table.raw, rows]))[
        len(table.row) :, : len(table.row)
    ]
    best = cosine.max(1)
    inside = best >= np.float32(table.half)
    assert np.array_equal(np.flatnonzero(inside), placed.row)
    assert np.array_equal(cosine[inside].argmax(1), placed.hub)
    assert np.array_equal(best[inside], placed.similarity)
    beside = ~inside & (best >= table.border)
    assert (placed.zone[beside] == hubs.BESIDE).all()
    assert beside.sum() > 300
    # rows of two hubs that are no pair, near enough to one another's
    assert set(placed.zone[inside]) <= {hubs.ABSORBED, hubs.BESIDE}
    assert not inside[placed.zone == hubs.APART].any()


def test_a_low_threshold_has_no_hubs():
    """Where nearly all rows lie beside a hub, visiting twice as far would cost more."""
    rng = np.random.default_rng(0)
    x = np.concatenate([ball(rng, 1000, np.eye(1, 24)[0], 0.05), rng.standard_normal((9000, 24))])
    x = rng.permutation(x).astype(np.float32)
    with mock.patch.object(hubs, "HUB_ROWS", 500):
        projection = fit_projection(x, 128, 0)
        for threshold, some in ((0.95, True), (0.1, False)):
            found = find_hubs(
                np.arange(len(x)), x, projection.encode(x)[0], projection,
                threshold=threshold, total=len(x), threads=1,
            )  # fmt: skip
            assert bool(len(found.row)) == some


@pytest.mark.usefixtures("small_hubs")
@pytest.mark.parametrize("kinds", [(np.float32, np.float32), (np.float16, np.float32)])
def test_a_kept_model_brings_no_hubs(tmp_path, kinds):
    """The earlier run counts its rows from 0, this one the earlier run's that stay, then others."""
    rng = np.random.default_rng(3)
    one, two = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 24)))
    parts = [ball(rng, 3000, one, 0.1), ball(rng, 2500, two, 0.1), truth.clustered(500, 24, 5)]
    x = rng.permutation(np.concatenate(parts))
    np.save(tmp_path / "a.npy", x[:3600].astype(kinds[0]))
    np.save(tmp_path / "b.npy", x[3600:].astype(kinds[1]))
    for seed in (0, 2):
        how, first, second = (
            {"recall": 1, "seed": seed},
            tmp_path / f"{seed}",
            tmp_path / f"{seed}b",
        )
        assert dedup(tmp_path / "a.npy", out=first, keep_work=True, **how).removed > 3000
        how["reference"] = first
        found = dedup(tmp_path / "b.npy", out=second, keep_work=True, **how)
        assert (found.search.notes["model"], found.search.notes["masses"]) == ("kept", 0)
        brute = dedup(tmp_path / "b.npy", method="exact", seed=seed, reference=first)
        assert found.groups.equals(brute.groups)
        with np.load(first / "work" / "model.npz") as file:
            assert len(file["hub_row"]) == 2


@pytest.mark.usefixtures("small_hubs")
@pytest.mark.parametrize("shift", [1, 10**9, -(10**9)])
def test_a_model_whose_hubs_are_other_rows_is_damaged(rows, tmp_path, shift):
    fitted = model.fit_model(open_features(rows), 0.95, 1, 0, 1)
    moved = dataclasses.replace(fitted.hubs, row=fitted.hubs.row + shift)
    fitted.hubs.check(open_features(rows))
    with pytest.raises(DamagedError, match="is not that row of the features"):
        moved.check(open_features(rows))
    with pytest.raises(DamagedError, match="is not that row of the features"):
        fitted.hubs.check(open_features(rows.astype(np.float64)))
    with (
        mock.patch.object(tasks, "fit_model", return_value=dataclasses.replace(fitted, hubs=moved)),
        pytest.raises(DamagedError, match=r"model\.npz: hub .* run again, it begins anew"),
    ):
        dedup(rows, out=tmp_path / "out")
    assert dedup(rows, out=tmp_path / "out").search.notes["masses"] >= 3


@pytest.mark.slow
def test_two_hundred_thousand_rows_within_99_hundredths():
    rng = np.random.default_rng(0)
    x = ball(rng, 200_000, np.eye(1, 256)[0], 0.098).astype(np.float16)
    start = time.monotonic()
    found = dedup(x, grouping="components")
    assert time.monotonic() - start < 120
    assert found.removed == 199_999
    assert found.search.notes["masses"] == 1
    assert found.search.notes["visits"] < 10 * len(x)
    assert dedup(x, threshold=0.9).removed == 199_999


@pytest.mark.usefixtures("small_hubs")
@pytest.mark.parametrize("first", [700, 9000])
@pytest.mark.parametrize("how", [{}, {"references_only": True}, {"grouping": "components"}])
def test_reference_rows_in_crowdsare_found_as_by_brute_force(rows, first, how):
    """There are no hubs beside references: every row of a crowd visits lists."""
    given = {"reference": rows[:first], **how}
    brute = dedup(rows[first:], method="exact", **given)
    found = dedup(rows[first:], recall=1, **given)
    assert found.search.notes["masses"] == 0
    for name in brute.members._fields:
        assert np.array_equal(getattr(found.members, name), getattr(brute.members, name)), name
    assert (brute.members.representative < 0).sum() > 1000


@pytest.mark.parametrize("rows", [1, 255, 257, 700])
def test_degrees_count_every_product_and_the_row_itself(rows):
    codes = np.random.default_rng(rows).integers(-9, 10, (rows, 8)).astype(np.int8)
    products = codes.astype(np.int64) @ codes.T
    with mock.patch.object(hubs, "BLOCK", 256):
        for limit in (0, 150):
            expected = (products >= limit).sum(1)
            assert hubs.degrees(codes, limit, 2).tolist() == expected.tolist()
