"""Training against hand-worked losses, numpy recall, and the same seed twice."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from snipdedup import config
from snipdedup.encoder import losses, network, training
from snipdedup.encoder.batches import CAPTIONS, Batches, load_distinct
from snipdedup.encoder.losses import (
    fitting_temperature,
    mse_loss,
    snip_loss,
    text_loss,
    training_loss,
)
from snipdedup.encoder.network import Encoder, pca_network, principal_directions
from snipdedup.encoder.training import train_encoder
from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.storage.out_folder import read_manifest

QUICK = {"dim": 8, "hidden": 32, "steps": 40, "batch": 128, "threads": 1, "device": "cpu"}


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows on a curved sheet of few dimensions, with noise: a linear map alone keeps them badly."""
    sheet = np.random.default_rng(1).normal(size=(3, dim))
    rng = np.random.default_rng(seed)
    found = np.sin(2 * rng.normal(size=(rows, 3)) @ sheet) + 0.05 * rng.normal(size=(rows, dim))
    return found.astype(np.float32)


def recall(rows: np.ndarray, y: np.ndarray, k: int = 10) -> float:
    """Share of the k nearest rows by cosine that descriptors find, by plain numpy."""
    x = rows.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = []
    for vectors in (x, y.astype(np.float64)):
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)
        near.append(np.argsort(-similarity, axis=1)[:, :k])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]))


def pca(rows: np.ndarray, dim: int) -> np.ndarray:
    """Directions of the largest second moments of unit rows, by numpy's SVD."""
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.linalg.svd(x, full_matrices=False)[2][:dim]


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_snip_loss_is_the_divergence_worked_by_hand():
    # Row 0 sees the others at cosines 0 and .6; the descriptors claim .6 and 0, and so on.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    y = x[[0, 2, 1]]
    t = 0.5
    total = 0.0
    for i in range(3):
        others = [j for j in range(3) if j != i]
        p, q = (
            np.exp([float(z[i] @ z[j]) / t for j in others])
            / np.exp([float(z[i] @ z[j]) / t for j in others]).sum()
            for z in (x, y)
        )
        total += float((p * np.log(p / q)).sum())
    assert float(snip_loss(t, x, y)) == pytest.approx(total / 3, rel=1e-5)
    assert total > 0.1
    assert float(snip_loss(0.02, x, x)) == pytest.approx(0, abs=1e-6)
    both = snip_loss(t, x, y, x)
    assert float(both) == pytest.approx(total / 3, rel=1e-5)


def test_snip_loss_has_finite_gradients():
    x = unit(clustered(50, 8))
    y = x.clone().requires_grad_()
    snip_loss(0.02, x, torch.nn.functional.normalize(y[:, :8])).backward()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize(("width", "wanted"), [(4, 5.0), (4, 10.0), (64, 10.0), (64, 40.0)])
def test_the_fitted_temperature_spreads_rows_over_so_many_others(width, wanted):
    """Neither the width of the features nor how they crowd around their mean matters."""
    for shift in (0.0, 3.0):
        rows = np.random.default_rng(0).normal(size=(300, width)) + shift
        x = unit(rows)
        similarity = (x @ x.T).numpy()
        others = similarity[~np.eye(300, dtype=bool)].reshape(300, 299)
        p = np.exp((others - 1) / fitting_temperature(x, wanted))
        p /= p.sum(axis=1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1).mean()
        assert math.exp(entropy) == pytest.approx(wanted, rel=0.02)


def test_a_temperature_stays_within_sense():
    low, high = losses.TEMPERATURES
    assert fitting_temperature(torch.ones(40, 1)) == pytest.approx(low, rel=0.01)
    assert fitting_temperature(torch.eye(8), 7.0 - 1e-9) == pytest.approx(low, rel=0.01)
    assert fitting_temperature(torch.eye(8), 8.0) == pytest.approx(high, rel=0.01)


def test_the_temperature_is_the_one_given_else_fitted_and_noted():
    rows = clustered(400, 16)
    _, history = train_encoder(rows, **QUICK)
    first = make(rows).rows.images[: QUICK["batch"]]
    fitted = fitting_temperature(unit(first))
    assert history.as_dict()["temperature"] == pytest.approx(fitted, rel=0.02)
    assert losses.TEMPERATURES[0] < fitted < losses.TEMPERATURES[1]
    assert train_encoder(rows, temperature=0.07, **QUICK)[1].temperature == 0.07
    assert train_encoder(rows, loss="mse", **QUICK)[1].temperature is None


def test_mse_loss_is_the_squared_error_of_similarities_worked_by_hand():
    # Cosines of the rows: 0, .6, .8; the descriptors claim .6, 0, .8. Each pair counts both ways.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    y = x[[0, 2, 1]]
    assert float(mse_loss(x, y)) == pytest.approx(2 * (0.6**2 + 0.6**2) / 3, rel=1e-6)
    assert float(mse_loss(x, x)) == 0


def test_principal_directions_are_those_of_the_svd():
    rows = clustered(400, 16)
    found = principal_directions(rows, 4).numpy()
    expected = pca(rows, 4)
    np.testing.assert_allclose(found.T @ found, expected.T @ expected, atol=1e-3)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)


def starts(rows: np.ndarray, dim: int) -> np.ndarray:
    """Unit rows on their first directions, of norm 1."""
    y = unit(rows).numpy() @ pca(rows, dim).T
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_the_network_starts_as_pca():
    rows = clustered(400, 16)
    network = pca_network(principal_directions(rows, 4), 8)
    y = starts(rows, 4)
    found = Encoder(network).encode(rows)
    np.testing.assert_allclose(found @ found.T, y @ y.T, atol=1e-3)


def test_snip_beats_pca_on_rows_it_never_saw():
    rows = clustered(3000, 64)
    encoder, history = train_encoder(rows[:2000], **{**QUICK, "steps": 120})
    unseen = rows[2000:]
    y = unit(unseen).numpy() @ pca(rows[:2000], 8).T
    start = recall(unseen, y / np.linalg.norm(y, axis=1, keepdims=True))
    assert recall(unseen, encoder.encode(unseen)) > start + 0.03
    assert history.best["validation_loss"] < 0.95 * history.curve[0]["validation_loss"]
    assert history.best["recall"] > history.curve[0]["recall"]


@pytest.mark.parametrize("loss", ["snip", "mse"])
def test_both_losses_learn_on_real_features(data, loss):
    files = [data / "keyframes" / "img_emb" / f"img_emb_000{number}.npy" for number in (2, 5)]
    rows = np.concatenate([np.load(file) for file in files])
    order = np.random.default_rng(0).permutation(len(rows))
    seen, unseen = rows[order[:8500]], rows[order[8500:]]
    given = {"dim": 32, "hidden": 256, "steps": 60, "batch": 512, "threads": 1}
    encoder, history = train_encoder(seen, **given, loss=loss)
    y = unit(unseen.astype(np.float32)).numpy() @ pca(seen.astype(np.float32), 32).T
    start = recall(unseen, y / np.linalg.norm(y, axis=1, keepdims=True))
    gain = recall(unseen, encoder.encode(unseen)) - start
    assert gain > (0.03 if loss == "snip" else 0)
    assert history.best["validation_loss"] < 0.98 * history.curve[0]["validation_loss"]


def test_the_validation_recall_is_that_of_plain_numpy():
    rows = clustered(500, 16)
    y = unit(rows).numpy()[:, :5]
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    validation = training.Validation(unit(rows), None, training_loss, 500)
    found = validation.recall(torch.from_numpy(y))
    assert found == pytest.approx(recall(rows, y), abs=1e-3)


def test_the_same_seed_gives_the_same_weights():
    rows = clustered(600, 24).astype(np.float16)
    weights = [
        train_encoder(rows, **{**QUICK, "steps": 12, "seed": seed, "threads": threads})[0].weights()
        for seed, threads in ((3, 2), (3, 2), (4, 2))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_opq_is_folded_in_and_changes_no_distance(monkeypatch):
    monkeypatch.setattr(network, "ROTATION_LEAST", 500)
    rows = clustered(600, 24)
    made = pca_network(principal_directions(rows, 16), 16, [8])
    whole, head = Encoder(made), Encoder(made, output=1)
    before, short = whole.encode(rows), head.encode(rows)
    np.testing.assert_allclose(short @ short.T, (y := starts(rows, 8)) @ y.T, atol=1e-3)
    network.rotate_for_codes(made, rows)
    for encoder, was in ((whole, before), (head, short)):
        now = encoder.encode(rows)
        assert np.abs(now - was).max() > 0.01
        np.testing.assert_allclose(now @ now.T, was @ was.T, atol=1e-5)


def make(rows, texts=None, validation_rows=4096, subset_rows=262_144, batch=128) -> Batches:
    beside = None if texts is None else open_features(texts)
    return Batches(
        open_features(rows), beside, subset_rows=subset_rows, validation_rows=validation_rows,
        batch=batch, seed=0,
    )  # fmt: skip


def seen_by(batches: Batches, steps: int) -> Iterator[np.ndarray]:
    """Yield the unit rows that the first steps see."""
    for step in range(1, steps + 1):
        yield batches.of_step(step).tensors("cpu")[0].numpy()


def keys(rows: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in np.asarray(rows)}


def test_held_out_rows_and_their_copies_are_never_trained_on():
    rows = np.repeat(clustered(400, 8).astype(np.float16), 3, axis=0)
    batches = make(rows, validation_rows=50, subset_rows=300, batch=100)
    held = keys(batches.held_out.tensors("cpu")[0].numpy())
    assert len(held) == 50
    seen, loads = set(), []
    for x in seen_by(batches, 60):
        loads.append(batches.subset)
        seen |= keys(x)
        assert len(keys(x)) == len(x)
    assert not held & seen
    assert len(set(loads)) > 3
    assert 300 < len(seen) <= 350  # other subsets bring other rows: nearly all 350


def test_a_set_that_fits_is_loaded_once_and_whole():
    rows = clustered(500, 8)
    batches = make(rows, validation_rows=100, subset_rows=400, batch=128)
    subset = batches.rows
    seen = set().union(*(keys(x) for x in seen_by(batches, 40)))
    assert batches.rows is subset
    assert len(seen) == 400


def test_the_curve_says_when_to_stop():
    def curve(*losses: float) -> training.History:
        points = [{"step": n, "validation_loss": loss} for n, loss in enumerate(losses)]
        return training.History(1, 1, 1, curve=points)

    assert not curve(5, 4, 3, 2, 1).stalled()
    assert not curve(1, 2, 2, 2, 2).stalled()
    assert curve(1, 2, 2, 2, 2, 2).stalled()
    assert curve(1, 0.9999, 0.9998, 0.9997, 0.9996, 0.9995).stalled()
    assert not curve(1, 2, 2, 2, 2, 0.9).stalled()
    assert curve(3, 1, 2).best["step"] == 1


def test_training_that_stalls_stops_and_keeps_the_best_weights():
    rows = clustered(400, 12)
    encoder, history = train_encoder(rows, **{**QUICK, "steps": 1000, "learning_rate": 1e-7})
    assert history.steps == training.PATIENCE * 50
    start = pca_network(principal_directions(make(rows).rows.images, 8), 32)
    same = encoder.encode(rows) @ encoder.encode(rows).T
    np.testing.assert_allclose(same, (y := Encoder(start).encode(rows)) @ y.T, atol=1e-3)


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [training.learning_rate(step, 200, 0.1) for step in range(1, 201)]
    assert np.argmax(rates) == training.WARMUP - 1
    assert rates[0] == pytest.approx(0.1 / training.WARMUP)
    assert max(rates) <= 0.1
    assert 0 < rates[-1] < 1e-4
    assert all(a > b for a, b in itertools.pairwise(rates[training.WARMUP :]))


def test_few_rows_train_and_say_so(tmp_path, snip):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "few.npy", clustered(300, 16))
    out, small = tmp_path / "encoder", ("--dim", 8, "--hidden", 16, "--steps", 20, "--threads", 1)
    said = snip("train", tmp_path / "in", "--out", out, *small).stdout
    assert "snip loss, 16 wide to 8: 20 steps of 240 rows" in said
    assert "60 of 300 rows, held out" in said
    assert "batches shrank" in said
    manifest = read_manifest(out, "encoder")
    assert [p["step"] for p in manifest["history"]["curve"]] == [0, 20]
    assert manifest["shards"][0]["name"] == "few.npy"
    assert manifest["settings"]["steps"] == 20
    assert sorted(p.name for p in out.iterdir()) == ["snip.json", "weights.pt"]
    options = config.Train(**manifest["settings"])
    assert "finished already" in str(training.run(options))
    snip(
        "compress", tmp_path / "in", "--encoder", out, "--out", tmp_path / "d", "--dtype", "float32"
    )
    found = np.load(tmp_path / "d" / "few.npy")
    assert np.array_equal(found, Encoder.load(out).encode(clustered(300, 16)))


def spoiled(value: float) -> np.ndarray:
    rows = clustered(300, 16)
    rows[207, 3] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (clustered(300, 16), {"dim": 17}, r"--dim 17: .* 16 wide; choose --dim 16 or less"),
        (clustered(63, 16), {}, r"in/a.npy: expected at least 64 rows to train on, found 63"),
        (np.tile(clustered(63, 16), (9, 1)), {}, r"at least 64 distinct rows .*found 63 among 567"),
        (spoiled(np.nan), {}, r"in/a.npy row 207 \(NaN\)"),
        (spoiled(-np.inf), {}, r"in/a.npy row 207 \(infinity\)"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_first_step(
    tmp_path, monkeypatch, rows, given, message
):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", rows)
    monkeypatch.setattr(training, "learning_rate", None)
    options = config.Train(
        features=str(tmp_path / "in"), out=str(tmp_path / "out"), **{**QUICK, **given}
    )
    with pytest.raises(SnipError, match=message):
        training.run(options)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda *_: math.nan)
    with pytest.raises(SnipError, match=r"not a number at step 20; lower --learning_rate"):
        train_encoder(clustered(300, 16), **QUICK)


def test_shards_of_other_widths_and_other_settings_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", clustered(100, 16))
    given = {"features": str(tmp_path / "in"), "out": str(tmp_path / "out"), **QUICK, "steps": 2}
    training.run(config.Train(**given))
    with pytest.raises(SnipError, match=r"finished run with other seed"):
        training.run(config.Train(**given, seed=1))
    assert "validation recall" in str(training.run(config.Train(**given, seed=1, overwrite=True)))
    np.save(tmp_path / "in" / "b.npy", clustered(100, 17))
    with pytest.raises(SnipError, match=r"b.npy: rows are 17 wide"):
        training.run(config.Train(**given, overwrite=True))
    assert read_manifest(tmp_path / "out", "encoder")["settings"]["seed"] == 1


def test_rewritten_shards_are_another_input(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.npy"
    np.save(path, clustered(100, 16))
    given = {"features": str(tmp_path / "in"), "out": str(tmp_path / "out"), **QUICK, "steps": 2}
    training.run(config.Train(**given))
    np.save(path, clustered(100, 16) * 2)
    os.utime(path, ns=(0, 1))
    with pytest.raises(SnipError, match="finished run with other features_changed"):
        training.run(config.Train(**given))


@contextmanager
def stopped(monkeypatch, after: int) -> Iterator[None]:
    """Interrupt training in the step after so many, checkpoints at each."""
    real = training.learning_rate

    def stop(step, *words):
        if step > after:
            raise KeyboardInterrupt
        return real(step, *words)

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_S", 0.0)
        patch.setattr(training, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("loss", ["snip", "mse"])
def test_a_killed_training_resumes_to_the_same_weights_and_curve(tmp_path, monkeypatch, loss):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", clustered(700, 16))
    asked = {**QUICK, "subset_rows": 200, "validation_rows": 100, "steps": 45, "loss": loss}
    asked["features"] = str(tmp_path / "in")
    training.run(config.Train(**asked, out=str(tmp_path / "straight")))
    again = config.Train(**asked, out=str(tmp_path / "killed"))
    for after in (17, 31):
        with stopped(monkeypatch, after):
            training.run(again)
        assert [p.name for p in (tmp_path / "killed").iterdir()] == ["work"]
    steps, real = [], training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda s, *a: (steps.append(s), real(s, *a))[1])
    training.run(again)
    assert steps == list(range(32, 46))  # not one step twice
    files = [tmp_path / name / "weights.pt" for name in ("straight", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    curves = [read_manifest(f.parent, "encoder")["history"]["curve"] for f in files]
    assert curves[0] == curves[1]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["snip.json", "weights.pt"]


def test_a_stopped_run_is_not_taken_for_one_with_other_settings(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", clustered(300, 16))
    given = {**QUICK, "features": str(tmp_path / "a.npy"), "out": str(tmp_path / "out")}
    with stopped(monkeypatch, 5):
        training.run(config.Train(**given))
    with pytest.raises(SnipError, match=r"stopped run with other seed"):
        training.run(config.Train(**given, seed=1))
    (tmp_path / "out" / "work" / "checkpoint.pt").write_bytes(b"half a file")
    training.run(config.Train(**given))  # from the beginning
    training.run(config.Train(**{**given, "out": str(tmp_path / "straight")}))
    files = [tmp_path / name / "weights.pt" for name in ("straight", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_stopped_at_its_manifest_resumes(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", clustered(100, 16))
    given = {**QUICK, "features": str(tmp_path / "a.npy"), "out": str(tmp_path / "out"), "steps": 2}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(network, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            training.run(config.Train(**given))
    assert not (tmp_path / "out" / "snip.json").exists()
    monkeypatch.setattr(training, "learning_rate", None)  # all steps were done
    assert "validation recall" in str(training.run(config.Train(**given)))


def paired(rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts of the same items: texts lie in another cone, and say less."""
    images = clustered(rows, dim)
    rng = np.random.default_rng(5)
    texts = images + 0.4 * rng.normal(size=images.shape) + 0.4 * rng.normal(size=dim)
    return images, texts.astype(np.float32)


def found_at_1(images: np.ndarray, texts: np.ndarray) -> float:
    return float(((texts @ images.T).argmax(axis=1) == np.arange(len(images))).mean())


def test_text_loss_is_the_divergence_worked_by_hand():
    x, t = torch.eye(2), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    y, u = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    total = 0.0
    for a, b in ((x @ t.T, y @ u.T), (t @ x.T, u @ y.T)):
        for i in range(2):
            p, q = (np.exp(z[i].numpy() / 0.5) / np.exp(z[i].numpy() / 0.5).sum() for z in (a, b))
            total += float((p * np.log(p / q)).sum()) / 4
    assert float(text_loss(0.5, x, t, y, u)) == pytest.approx(total, rel=1e-5)
    assert total > 0.001


def test_texts_keep_finding_their_images():
    images, texts = paired(2000, 48)
    given = {**QUICK, "steps": 120, "dim": 6}
    kept = []
    for beside in (None, texts[:1500]):
        encoder, _ = train_encoder(images[:1500], **given, text_features=beside)
        kept.append(found_at_1(encoder.encode(images[1500:]), encoder.encode(texts[1500:])))
    assert kept[1] > kept[0] + 0.02


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (clustered(299, 16), r"t.npy: --text_features are 299 rows .* FEATURES are 300 rows"),
        (
            clustered(300, 15),
            r"t.npy: --text_features are 300 rows 15 wide, .* 300 rows 16 wide",
        ),
        (clustered(300, 16) * np.where(np.arange(300) == 7, np.nan, 1)[:, None], r"t.npy row 7"),
    ],
)
def test_texts_that_do_not_fit_are_refused(tmp_path, monkeypatch, texts, message):
    np.save(tmp_path / "a.npy", clustered(300, 16))
    np.save(tmp_path / "t.npy", texts)
    monkeypatch.setattr(training, "learning_rate", None)
    given = {"features": str(tmp_path / "a.npy"), "text_features": str(tmp_path / "t.npy")}
    with pytest.raises(SnipError, match=message):
        training.run(config.Train(**QUICK, **given, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_one_image_with_several_captions_is_several_pairs():
    images, texts = paired(100, 16)
    images, texts = np.repeat(images, 3, axis=0), np.concatenate([texts, texts, texts[::-1]])
    texts[::3] = texts[0]
    rows = load_distinct(open_features(images), open_features(texts), np.arange(300))
    pairs = {image.tobytes() + text.tobytes() for image, text in zip(images, texts, strict=True)}
    assert len(rows.images) == len(pairs)
    assert rows.texts.shape == rows.images.shape


def test_an_image_is_held_out_with_all_its_captions():
    images, texts = np.repeat(clustered(400, 16), 3, axis=0), clustered(1200, 16, seed=5)
    batches = make(images, texts, validation_rows=90, batch=64)
    held = keys(batches.held_out.images)
    assert 90 <= len(batches.held_out.images) < 93
    assert len(batches.held_out.images) == 3 * len(held)
    assert not held & keys(batches.rows.images)
    # The temperature is not that of images beside copies of themselves.
    settings = {**QUICK, "validation_rows": 90, "batch": 64, "steps": 1}
    beside = train_encoder(images, text_features=texts, **settings)[1]
    alone = train_encoder(images[::3], **settings)[1]
    assert beside.held_out == len(batches.held_out.images)
    assert beside.temperature == pytest.approx(alone.temperature, rel=0.25)


def test_an_image_with_very_many_captions_is_not_all_that_is_judged():
    images = np.concatenate([np.repeat(clustered(1, 16), 900, axis=0), clustered(400, 16, seed=3)])
    batches = make(images, clustered(1300, 16, seed=5), validation_rows=100)
    counts = np.unique(batches.held_out.images, axis=0, return_counts=True)[1]
    assert 81 <= counts.sum() < 81 + CAPTIONS  # a fifth of 8 + 400, then whole images
    assert counts.max() <= CAPTIONS
    assert not keys(batches.held_out.images) & keys(batches.rows.images)


def test_texts_are_compressed_like_images(tmp_path, snip):
    images, texts = paired(300, 16)
    for name, rows in (("img_emb", images), ("text_emb", texts)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / f"{name}_0.npy", rows)
    encoder = tmp_path / "encoder"
    small = ("--dim", 8, "--hidden", 16, "--steps", 20, "--threads", 1)
    snip(
        "train",
        tmp_path / "img_emb",
        "--text_features",
        tmp_path / "text_emb",
        "--out",
        encoder,
        *small,
    )
    snip(
        "compress",
        tmp_path / "text_emb",
        "--encoder",
        encoder,
        "--out",
        tmp_path / "d",
        "--dtype",
        "float32",
    )
    assert np.array_equal(
        np.load(tmp_path / "d" / "text_emb_0.npy"), Encoder.load(encoder).encode(texts)
    )
