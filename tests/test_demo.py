"""The demo's pictures, edits and descriptors; then the whole of it, checked from its files."""

from __future__ import annotations

import json
import re
import shlex
import struct
import tarfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import wait_until

import snipdedup
from snipdedup import demo
from snipdedup.config import Demo
from snipdedup.errors import SnipError

DRAWN = 300
TEXTS = ("key", "planted_copy_of", "edit")


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(7)
    return [demo.stored(demo.draw(rng)) for _ in range(40)]


# ---- pictures


def test_pictures_differ_and_are_what_a_file_would_hold(drawn):
    for picture in drawn:
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.float32
        levels = picture * 255
        assert np.abs(levels - np.round(levels)).max() < 1e-4
        assert levels.min() >= 0
        assert levels.max() <= 255
        assert picture.std() > 0.01
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)


def test_the_dct_is_orthonormal():
    basis = demo.cosine_basis(8, 8)
    assert np.abs(basis @ basis.T - np.eye(8)).max() < 1e-6
    assert np.allclose(basis[0], np.sqrt(1 / 8))
    assert np.allclose(basis[1, 0], 0.5 * np.cos(np.pi / 16))  # ITU-T T.81, A.3.3


def test_resampling_by_hand():
    assert np.allclose(demo.resampling(4, 0, 4, 4), np.eye(4))
    assert np.allclose(demo.resampling(4, 1, 3, 2), np.eye(4)[1:3])
    halved = demo.resampling(4, 0, 4, 2) @ np.array([0, 1, 2, 3])
    # weights 3/4, 3/4, 1/4 of values 0, 1, 2; the fourth would lie beyond the border
    assert np.allclose(halved, [1.25 / 1.75, 3 - 1.25 / 1.75])
    for matrix in (
        demo.resampling(64, 2.3, 61.7, 64),
        demo.resampling(64, 0, 64, 30),
    ):
        assert np.allclose(matrix.sum(axis=1), 1)
        assert (matrix >= 0).all()
        middle = matrix @ np.arange(64)
        assert (np.diff(middle) > 0).all()


@pytest.mark.parametrize("name", demo.EDITS)
def test_edits_change_a_little(drawn, name):
    rng = np.random.default_rng(1)
    for picture in drawn:
        before = picture.copy()
        edited = demo.stored(demo.EDITS[name](picture, rng))
        assert edited.shape == picture.shape
        assert np.array_equal(picture, before)
        assert np.array_equal(edited, picture) == (name == "exact")
        limit = 0.25 if name == "brightness" else 0.15
        assert np.abs(edited - picture).mean() < limit


def test_jpeg_loses_more_at_lower_quality(drawn):
    class Quality:
        def __init__(self, value):
            self.value = value

        def uniform(self, low, high):
            return self.value

    losses = [
        np.mean([np.abs(demo.jpeg(p, Quality(q)) - p).mean() for p in drawn])
        for q in (5_000, 50, 15, 5)
    ]
    assert losses[0] < 0.002
    assert losses == sorted(losses)


def test_descriptors_have_three_parts_of_norm_one(drawn):
    found = demo.descriptor_of(drawn[0])
    assert found.shape == (128 + 63 + 48,)
    norms = [np.linalg.norm(part) for part in np.split(found, [128, 191])]
    assert np.allclose(norms, 1)
    assert np.array_equal(found, demo.descriptor_of(drawn[0].copy()))
    assert np.isfinite(demo.descriptor_of(np.zeros((64, 64, 3), np.float32))).all()


def test_gradients_know_their_direction():
    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None, :, None], 64, 0).repeat(3, 2)
    across = demo.descriptor_of(ramp)[:128].reshape(8, 16)
    down = demo.descriptor_of(ramp.transpose(1, 0, 2))[:128].reshape(8, 16)
    assert np.allclose(across[0], 0.25)  # 16 places alike, one direction
    assert np.allclose(across[1:], 0)
    assert np.allclose(down[4], 0.25)


def test_png_can_be_read_back(drawn):
    data = demo.png(np.concatenate(drawn[:2], axis=1))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        chunks[name], at = body, at + 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (128, 64, 8, 2, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(64, 1 + 128 * 3)
    assert not lines[:, 0].any()
    pixels = lines[:, 1:].reshape(64, 128, 3)
    assert np.allclose(pixels[:, 64:] / 255, drawn[1], atol=1e-6)


def test_copies_are_closer_than_strangers():
    planted = demo.plant(200, seed=3)
    rows = planted.features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    strangers = demo.most_alike(planted.features[planted.originals])
    cosines = rows[planted.originals] @ rows[planted.originals].T
    assert strangers == pytest.approx(cosines[~np.eye(200, dtype=bool)].max(), abs=1e-6)
    for name in demo.EDITS:
        copies = np.flatnonzero(planted.edit == name)
        assert len(copies) == 40
        originals = planted.originals[planted.picture[copies]]
        assert (planted.edit[originals] == "").all()
        pairs = np.einsum("ij,ij->i", rows[copies], rows[originals])
        assert np.median(pairs) > 0.9
        assert np.quantile(pairs, 0.1) > strangers
    assert len(planted.picture) == 200 * 2


def test_planting_is_repeatable():
    once, again, other = demo.plant(60, 1), demo.plant(60, 1), demo.plant(60, 2)
    assert np.array_equal(once.features, again.features)
    assert np.array_equal(once.edit, again.edit)
    assert not np.array_equal(once.features, other.features)


# ---- the whole


@pytest.fixture(scope="module")
def finished(snip, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, snip("demo", "--out", out, "--pictures", DRAWN)


def test_the_demo_writes_the_layout_of_laion(finished):
    out, _ = finished
    shards = sorted((out / "img_emb").iterdir())
    tables = sorted((out / "metadata").iterdir())
    assert [p.stem.replace("img_emb", "metadata") for p in shards] == [p.stem for p in tables]
    features = np.concatenate([np.load(path) for path in shards])
    assert features.dtype == np.float16
    assert features.shape == (2 * DRAWN, 239)
    table = pq.read_table(out / "metadata").to_pydict()
    assert len(table["key"]) == len(set(table["key"])) == 2 * DRAWN
    for edit, key in zip(table["edit"], table["planted_copy_of"], strict=True):
        assert (edit is None) == (key is None)
        assert edit is None or table["edit"][table["key"].index(key)] is None
    exact = [row for row, edit in enumerate(table["edit"]) if edit == "exact"]
    for row in exact:
        original = table["key"].index(table["planted_copy_of"][row])
        assert np.array_equal(features[row], features[original])


def test_the_demo_shows_each_command_and_what_it_said(finished):
    out, done = finished
    shown = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ snip ")]
    assert shown == ["train", "compress", "index", "dedup", "dedup", "filter", "report"]
    for word in ("train", "img_emb", "encoder", "descriptors", "index", "clean", "kept"):
        assert word in done.stdout
    for name in ("encoder", "descriptors", "index", "clean", "adc", "kept"):
        assert (out / name / "snip.json").is_file()
    assert not (out / "work").exists()


def test_each_row_has_its_picture_in_a_tar(finished):
    out, _ = finished
    tars = sorted((out / "images").iterdir())
    table = pq.read_table(out / "metadata").to_pydict()
    found = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    assert list(found) == [f"{key}.png" for key in table["key"]]
    for key, original, edit in zip(*(table[n] for n in TEXTS), strict=True):
        same = original and found[f"{key}.png"] == found[f"{original}.png"]
        assert same == (edit == "exact" if original else None)


def test_the_report_shows_those_pictures(finished, browser):
    """What the last command printed and the page in a browser: all pictures there, no request."""
    out, done = finished
    shown = re.search(r"pictures of (\d+) of the (\d+) rows shown", done.stdout)
    assert shown[1] == shown[2]
    path = out / "clean" / "report.html"
    assert f"look at it, in a browser: {path}\n" in done.stdout
    features = np.concatenate([np.load(path) for path in sorted((out / "img_emb").iterdir())])
    threshold = json.loads((out / "snip.json").read_text())["threshold"]
    result = snipdedup.dedup(features, threshold=threshold)
    with browser.open(path.as_uri()) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wait_until(page, "[...document.images].every(i => i.complete && i.naturalWidth)")
        tiles = page.locator(".tile").count()
        images = page.locator(".tile img")
        assert images.count() == tiles > 100
        assert all(box["width"] > 50 for box in (images.nth(n).bounding_box() for n in (0, 20, 99)))
        lines = page.eval_on_selector_all(
            "#threshold tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
        )
        for threshold, removed, kept, _ in (lines[0], lines[len(lines) // 2], lines[-1]):
            other = result.at(float(threshold), grouping="components")
            assert (removed, kept) == (f"{other.removed:,}", f"{other.kept:,}")
        assert page.asked == []


def test_what_it_suggests_runs(finished, snip):
    _, done = finished
    lines = done.stdout.partition("what to try next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [words[:2] for words in commands] == [["snip", n] for n in ("top", "audit", "search")]
    said = [snip(*words[1:]).stdout for words in commands]
    assert "dup_count" in said[0]
    assert "passed" in said[1]
    assert "drawn picture" in said[2]


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_the_report_is_true(finished):
    """Count again from the files, by keys and in plain Python."""
    out, done = finished
    table = pq.read_table(out / "metadata").to_pylist()
    picture = [row["planted_copy_of"] or row["key"] for row in table]
    groups = pq.read_table(out / "clean" / "groups.parquet").to_pylist()
    group = {row["row"]: row["group"] for row in groups}
    right = sum(r["is_dup"] and picture[r["row"]] == picture[r["representative"]] for r in groups)
    removed = sum(row["is_dup"] for row in groups)
    percent = f"{100 * right / removed:.1f} %"
    assert f"join: {removed:,} rows removed, {right:,} of them ({percent})" in done.stdout
    row_of = {row["key"]: number for number, row in enumerate(table)}
    for edit in demo.EDITS:
        copies = [n for n, row in enumerate(table) if row["edit"] == edit]
        together = [
            n in group and group[n] == group.get(row_of[table[n]["planted_copy_of"]])
            for n in copies
        ]
        share = 100 * sum(together) / len(copies)
        lines = [line for line in done.stdout.splitlines() if f"copies, {edit} " in line]
        assert len(lines) == 1
        assert lines[0].split()[:3] == [str(DRAWN // 5), "copies,", edit]
        assert lines[0].split()[3] == f"{share:.1f}"
    staying = [picture[n] for n in range(len(table)) if not np.load(out / "clean/is_dup.npy")[n]]
    said = (
        f"{len(staying)} rows are kept, of {DRAWN} pictures drawn: "
        f"{len(staying) - len(set(staying))} more than one a picture, "
        f"{DRAWN - len(set(staying))} pictures lost"
    )
    assert said in done.stdout
    kept = [row for p in sorted((out / "kept").glob("*.parquet")) for row in rows_of(p)]
    assert [row["key"] for row in kept] == [
        row["key"] for n, row in enumerate(table) if not np.load(out / "clean/is_dup.npy")[n]
    ]


def test_the_demo_finds_most_of_what_it_planted(finished):
    _, done = finished
    for edit, least in {
        "exact": 100,
        "resize": 95,
        "crop": 90,
        "brightness": 90,
        "jpeg": 75,
    }.items():
        line = next(line for line in done.stdout.splitlines() if f"copies, {edit} " in line)
        assert float(line.split()[3]) >= least, line
    assert "(100.0 %) beside" in done.stdout


def test_a_finished_demo_says_so_and_another_one_is_refused(finished, snip):
    out, done = finished
    stamp = (out / "snip.json").stat().st_mtime_ns
    again = snip("demo", "--out", out, "--pictures", DRAWN)
    assert "is finished already; --overwrite" in again.stdout
    report = json.loads((out / "snip.json").read_text())["report"]
    assert report in done.stdout
    assert report in again.stdout
    assert (out / "snip.json").stat().st_mtime_ns == stamp
    other = snip("demo", "--out", out, "--pictures", DRAWN, "--seed", 5, status=1)
    assert "other seed (0, now 5)" in other.stderr


def test_a_folder_of_someone_else_is_refused_before_any_drawing(snip, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    done = snip("demo", "--out", tmp_path, status=1)
    assert "not a folder that snip wrote" in done.stderr
    assert done.stdout == ""


def test_a_command_that_fails_or_is_stopped_stops_the_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.cli, "run", lambda words: 1)
    with pytest.raises(SnipError, match=r"the demo stopped at: snip train .*img_emb --out"):
        demo.run(Demo(out=str(tmp_path / "out"), pictures=60))
    assert not (tmp_path / "out" / "snip.json").exists()
    monkeypatch.setattr(demo.cli, "run", lambda words: 130)
    with pytest.raises(KeyboardInterrupt):
        demo.run(Demo(out=str(tmp_path / "out"), pictures=60))


def test_overwrite_replaces_what_an_earlier_demo_left(monkeypatch, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(demo.cli, "run", lambda words: 1)
    with pytest.raises(SnipError, match="the demo stopped at"):
        demo.run(Demo(out=str(out), pictures=500))
    assert len(list((out / "img_emb").iterdir())) == 2
    with pytest.raises(SnipError, match="the demo stopped at"):
        demo.run(Demo(out=str(out), pictures=60, overwrite=True))
    assert len(list((out / "img_emb").iterdir())) == 1


def test_a_demo_that_was_stopped_goes_on(monkeypatch, tmp_path, capsys):
    out, real, done = tmp_path / "out", demo.cli.run, []

    def stops(words):
        if "adc" in str(words):
            return 130
        return real(words)

    monkeypatch.setattr(demo.cli, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        demo.run(Demo(out=str(out), pictures=60))
    parts = ("img_emb", "metadata", "encoder", "index", "clean")
    before = {p: p.stat().st_mtime_ns for part in parts for p in (out / part).rglob("*.*")}
    assert len(before) > 5

    def counts(words):
        done.append(words[0])
        return real(words)

    monkeypatch.setattr(demo.cli, "run", counts)
    capsys.readouterr()
    assert "pictures lost" in demo.run(Demo(out=str(out), pictures=60))
    assert done == ["train", "compress", "index", "dedup", "dedup", "filter", "report"]
    assert capsys.readouterr().out.count("already") == 4
    assert before == {p: p.stat().st_mtime_ns for p in before}
