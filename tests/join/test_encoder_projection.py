"""The join on an encoder's codes: what it proposes is proved, and it finds the share asked for."""

from __future__ import annotations

import numpy as np
import pytest
import truth

from snipdedup import config
from snipdedup.deduplication.run import dedup
from snipdedup.encoder import training
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.cosine import integer_rows
from snipdedup.join import model as room
from snipdedup.join.calibration import Target, calibrate_limit
from snipdedup.join.forest import make_edges
from snipdedup.join.model import Model
from snipdedup.join.projection import EncoderProjection

WIDTH = 48


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(9000, WIDTH, 3).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(rows, tmp_path_factory):
    """A briefly trained encoder of half the width."""
    folder = tmp_path_factory.mktemp("learned") / "encoder"
    np.save(folder.parent / "rows.npy", rows)
    training.run(
        config.Train(
            features=str(folder.parent / "rows.npy"), out=str(folder), dim=24, steps=60, threads=1
        )
    )
    return folder


@pytest.mark.parametrize("lists", [False, True])
def test_it_finds_the_share_asked_for_and_invents_nothing(rows, encoder, lists, monkeypatch):
    if lists:
        monkeypatch.setattr(room, "SINGLE_LIST_ROWS", 0)
    found = dedup(rows, encoder=str(encoder))
    brute = dedup(rows, method="exact")
    assert found.search.notes["widths"] == [24, 0]
    assert (found.search.notes["nlist"] > 1) == lists
    assert len(found.search.forest.a) >= 0.998 * len(brute.search.forest.a)
    forest = found.search.forest
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1)[:, None]
    cosine = (unit[forest.a] * unit[forest.b]).sum(1)
    np.testing.assert_allclose(forest.similarity, cosine, atol=1e-6)
    assert (forest.similarity >= np.float32(0.95)).all()


def test_codes_are_the_rotated_descriptors(rows, encoder):
    codes = EncoderProjection.of(encoder, 0, "cpu")
    found, falls = codes.encode_block(rows[:2048], integer_rows(rows[:2048])[0])
    z = codes.encoder.encode(rows[:2048])
    np.testing.assert_allclose(codes.matrix @ codes.matrix.T, np.eye(24), atol=1e-5)
    inside = falls == 0
    assert inside.mean() > 0.99
    np.testing.assert_allclose(found[inside] / codes.scale, (z @ codes.matrix)[inside], atol=0.006)


def test_what_is_learnt_lets_the_wanted_share_of_pairs_pass(rows, encoder):
    codes = EncoderProjection.of(encoder, 0, "cpu")
    brute = dedup(rows, method="exact").search
    lowest = [
        calibrate_limit(codes, rows, brute.forest, Target(0.95, recall, 1.0, 1))
        for recall in (0.5, 0.9, 0.99, 1)
    ]
    assert lowest == sorted(lowest, reverse=True)
    z = codes.encode(rows)[0].astype(np.int64)
    products = (z[brute.forest.a] * z[brute.forest.b]).sum(1)
    for recall, least in zip((0.5, 0.9, 0.99), lowest, strict=False):
        assert np.mean(products >= least) >= recall
    nothing = make_edges(*[np.empty(0, np.int64)] * 2, np.empty(0))
    assert calibrate_limit(codes, rows, nothing, Target(0.95, 0.99, 1.0, 1)) < -(codes.scale**2)


def test_a_saved_model_is_the_same_again(rows, encoder, tmp_path):
    from snipdedup.features.shards import open_features

    model = room.fit_model(open_features(rows), 0.95, 0.999, 0, 1, encoder)
    model.save(tmp_path / "model.npz")
    again = Model.load(tmp_path / "model.npz")
    assert (again.limits, again.widths) == (model.limits, (24, 0))
    np.testing.assert_array_equal(
        again.narrow.encode(rows[:500])[0], model.narrow.encode(rows[:500])[0]
    )


def test_what_does_not_fit_is_refused(encoder, tmp_path):
    with pytest.raises(SnipError, match=f"rows are 5 wide, --encoder .* expects {WIDTH}"):
        dedup(np.eye(5, dtype=np.float32), encoder=str(encoder))
    with pytest.raises(UsageError, match="--encoder goes with --method join or adc, not exact"):
        config.Dedup(features="x", out="o", method="exact", encoder=str(encoder)).check()
    with pytest.raises(SnipError, match="nowhere"):
        dedup(np.eye(5, dtype=np.float32), encoder=str(tmp_path / "nowhere"))
