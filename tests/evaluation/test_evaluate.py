"""Evaluation: what is judged is kept from training, numbers agree with brute force, files whole."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest

from snipdedup import config
from snipdedup.adc.threshold import calibrate
from snipdedup.encoder import training
from snipdedup.encoder.network import opq_rotation
from snipdedup.errors import SnipError, UsageError
from snipdedup.evaluation import evaluate, presentation
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import open_features
from snipdedup.index.quantizer import train_quantiser
from snipdedup.storage.out_folder import read_manifest

QUICK = {
    "dim": 8,
    "steps": 20,
    "queries": 100,
    "nlist": 8,
    "code_bytes": "2,4",
    "nprobe": "1,4",
    "threads": 1,
    "train_rows": 400,
}


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.sin(2 * rng.normal(size=(rows, 4)) @ np.random.default_rng(1).normal(size=(4, dim)))
    copies = rng.permutation(rows)[: rows // 3]
    found[copies] = found[rng.integers(0, rows, len(copies))]
    return (found + 0.02 * rng.normal(size=found.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One evaluation with texts; its folder, its result, and the rows."""
    folder = tmp_path_factory.mktemp("eval")
    rows = clustered(900, 16)
    texts = rows + 0.3 * np.random.default_rng(2).normal(size=rows.shape).astype("f4")
    for name, part in (("img_emb", rows), ("text_emb", texts)):
        (folder / name).mkdir()
        np.save(folder / name / f"{name}_0.npy", part[:500])
        np.save(folder / name / f"{name}_1.npy", part[500:])
    options = config.Eval(
        features=str(folder / "img_emb"),
        text_features=str(folder / "text_emb"),
        out=str(folder / "out"),
        picture=False,
        **QUICK,
    )
    said = evaluate.run(options)
    return folder, options, said, rows


def test_the_result_holds_every_measurement(done):
    folder, options, said, _ = done
    body = json.loads((folder / "out" / "eval.json").read_text())
    assert {e["contender"] for e in body["neighbours"]} == {"raw", "opq", "pca", "mse", "snip"}
    coded = {(e["bytes"], e["nprobe"]) for e in body["neighbours"] if e["contender"] == "snip"}
    assert coded == {(None, None), *((m, n) for m in (2, 4) for n in (1, 4, 8))}
    assert {e["rule"] for e in body["flags"]} == {"global", "ratio", "difference"}
    assert {(e["contender"], e["direction"]) for e in body["text"]} == {
        (name, way) for name in ("raw", "pca", "mse", "snip")
        for way in ("text to image", "image to text")
    }  # fmt: skip
    assert (body["rows"], body["queries"]) == (900, 100)
    page = (folder / "out" / "eval.md").read_text()
    assert "| SNIP |" in page
    assert "SNIP" in str(said)
    assert sorted(read_manifest(folder / "out", "eval")["outputs"]) == [
        "eval.json",
        "eval.md",
    ]
    again = evaluate.run(options)
    assert "finished already" in str(again)
    assert again.results == body == said.results


def test_raw_rows_without_codes_are_the_truth_and_stages_add_up(done):
    folder, *_ = done
    body = json.loads((folder / "out" / "eval.json").read_text())
    raw = next(e for e in body["neighbours"] if e["contender"] == "raw" and not e["bytes"])
    assert set(raw["recall"].values()) == {1.0}
    for line in body["budget"]:
        lost = line["encoder"] + line["code"] + line["probes"]
        assert line["recall"] + lost == pytest.approx(1, abs=2e-3)


def test_duplicates_are_those_of_brute_force(done):
    folder, options, _, rows = done
    body = json.loads((folder / "out" / "eval.json").read_text())
    rng = np.random.default_rng(options.seed)
    queries = evaluate.sample_rows(900, 100, rng)
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = x[queries] @ x.T
    cosine[np.arange(100), queries] = -1
    assert body["duplicates"] == int((cosine.max(axis=1) >= 0.95).sum()) > 5


def test_no_query_and_no_copy_of_one_is_learnt_from():
    rows = np.repeat(clustered(200, 8), 2, axis=0)
    queries = np.arange(0, 400, 8)
    learn = evaluate.learnable(open_features(rows), queries, 1000, np.random.default_rng(0))
    taken = {rows[row].tobytes() for row in queries}
    assert not any(rows[row].tobytes() in taken for row in learn)
    assert len(learn) == 300
    few = evaluate.learnable(open_features(rows), queries, 70, np.random.default_rng(0))
    assert len(few) == 70
    assert (np.diff(few) > 0).all()


def test_a_given_encoder_is_judged_and_must_fit(done):
    folder, options, _, rows = done
    small = {"hidden": 16, "steps": 5, "threads": 1, "dim": 6}
    training.run(config.Train(features=rows[:300], out=str(folder / "encoder"), **small))
    given = {**options.as_dict(), "encoder": str(folder / "encoder"), "text_features": None}
    evaluate.run(config.Eval(**{**given, "out": str(folder / "judged"), "code_bytes": "2,4"}))
    body = json.loads((folder / "judged" / "eval.json").read_text())
    sizes = {e["bytes"] for e in body["neighbours"] if e["contender"] == "snip"}
    assert sizes == {None, 2}  # 4 does not divide the width of 6
    with pytest.raises(SnipError, match=r"rows are 12 wide, --encoder .* expects 16"):
        evaluate.run(config.Eval(**{**given, "features": rows[:, :12], "out": str(folder / "bad")}))
    assert not (folder / "bad").exists()


def test_texts_that_do_not_match_are_refused(done):
    folder, options, _, rows = done
    given = {**options.as_dict(), "out": str(folder / "bad"), "text_features": rows[:-1]}
    with pytest.raises(SnipError, match=r"--text_features are 899 rows .* FEATURES are 900 rows"):
        evaluate.run(config.Eval(**given))
    assert not (folder / "bad").exists()


def test_more_lists_than_rows_are_refused(done):
    folder, options, *_ = done
    given = {**options.as_dict(), "out": str(folder / "bad"), "nlist": 901}
    with pytest.raises(SnipError, match=r"--nlist 901: there are only 900 rows"):
        evaluate.run(config.Eval(**given))
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("text", ["4,x", "", "0,4", "300", "4;8"])
def test_code_sizes_are_whole_numbers(text):
    with pytest.raises(UsageError, match="--code_bytes must be whole numbers from 1 to 256"):
        config.Eval(features="x", out="y", code_bytes=text)
    assert config.Eval(features="x", out="y", code_bytes="8,4,8").numbers("code_bytes") == [4, 8]


def test_the_picture_is_drawn_from_the_result(done, tmp_path):

    pytest.importorskip("matplotlib")
    body = json.loads((done[0] / "out" / "eval.json").read_text())
    for name in ("a.png", "b.png"):
        presentation.draw_picture(body, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_extra_is_named_before_any_work(done, monkeypatch):
    folder, options, *_ = done
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = {**options.as_dict(), "picture": True, "out": str(folder / "bad")}
    with pytest.raises(SnipError, match=r"snipdedup-toolkit\[plot\].* --nopicture"):
        evaluate.run(config.Eval(**given))
    assert not (folder / "bad").exists()


def test_tables_leave_out_what_was_not_measured():
    measured = [
        {"contender": "opq", "bytes": 4, "nprobe": 8, "recall": {"10": 0.5}},
        {"contender": "snip", "bytes": None, "nprobe": None, "recall": {"10": 0.75}},
        {"contender": "snip", "bytes": 4, "nprobe": 8, "recall": {"10": 0.625}},
    ]
    assert presentation.recall_table({"neighbours": measured}, "10", 8)[2:4] == [
        "| OPQ on raw | 0.500 |  |",
        "| SNIP | 0.625 | 0.750 |",
    ]


def test_points_of_flags_are_those_of_calibration():
    rng = np.random.default_rng(0)
    best = np.append(np.round(rng.random(200), 2), [np.inf] * 5).astype(np.float32)
    right = rng.random(205) < 1 - np.minimum(best, 1)
    points = evaluate.flag_points(best, right, evaluate.CURVE)
    assert [p["wanted"] for p in points] == evaluate.CURVE
    for point in points:
        margin, reached = calibrate(best, right, point["wanted"])
        assert (point["margin"], point["precision"]) == (margin, reached["precision"])
        assert point["recall"] == (reached["recall"] if reached["reached"] else 0)
    nothing = evaluate.flag_points(np.full(3, np.inf, np.float32), right[:3], [0.9])
    assert nothing == [{"wanted": 0.9, "margin": 0.0, "precision": None, "recall": 0.0}]


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (np.eye(600, dtype=np.float32), {"train_rows": 100}, "--train_rows must lie between 256"),
        (clustered(300, 16), {"queries": 75}, "rows are left to learn from"),
        (np.ones((900, 16), np.float32), {}, "0 rows are left to learn from"),
    ],
)
def test_too_few_rows_to_learn_from_are_refused_before_the_work(tmp_path, rows, how, message):
    np.save(tmp_path / "e.npy", rows)
    how = {**QUICK, "picture": False, **how}
    with pytest.raises(SnipError, match=message):
        evaluate.run(
            config.Eval(features=str(tmp_path / "e.npy"), out=str(tmp_path / "out"), **how)
        )
    assert not (tmp_path / "out").exists()


def rows_of(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    return (centres[rng.integers(0, 20, rows)] + 0.5 * rng.normal(size=(rows, dim))).astype("f4")


def test_the_own_row_is_left_out_wherever_it_stands():
    I = np.array([[7, 1, 2], [3, 8, 4], [5, 6, 0]])
    found = evaluate.drop_own(I, np.array([7, 8, 9]))
    assert found.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_codes_find_what_plain_faiss_finds():
    x = unit_rows(rows_of(3000, 16))
    quantiser = train_quantiser(x, nlist=8, m=4, nbits=8, seed=0, threads=1)
    codes = evaluate.IndexedRows(quantiser)
    for part in np.array_split(x, 4):
        codes.add(part)
    D, I = codes.search(x[:50], 5, 3)
    plain = faiss.clone_index(quantiser.ivfpq)
    plain.nprobe = 3
    np.testing.assert_array_equal(plain.search(x[:50], 5)[1], I)
    at = {int(i): float(d) for i, d in zip(I[0], D[0], strict=True)}
    stored = plain.reconstruct_batch(I[0]) if plain.make_direct_map() is None else None
    for row, q in zip(I[0], stored, strict=True):
        assert at[int(row)] == pytest.approx(float(((x[0] - q) ** 2).sum()), abs=1e-4)
    every = codes.nearest_of_all(x[100:150], np.arange(100, 150), 5, 2)
    plain.nprobe = 8
    expected = evaluate.drop_own(plain.search(x[100:150], 6)[1], np.arange(100, 150))
    assert (expected == every).mean() > 0.98  # rows of one code tie


def test_opq_turns_without_stretching():
    x = unit_rows(rows_of(600, 16))
    rotation = opq_rotation(x, 4, 3, 6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-4)
