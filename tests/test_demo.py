"""The demo's pictures and edits; then the whole of it, checked from its files."""

from __future__ import annotations

import json
import re
import shlex
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import wait_until
from PIL import Image, ImageChops, ImageStat

import snipdedup
from snipdedup import demo
from snipdedup.config import Demo
from snipdedup.errors import SnipError

DRAWN = 200
NOTES = ("left.parquet", "links.json", "run.lock")


@pytest.fixture(scope="module")
def drawn():
    return [demo.draw(np.random.default_rng([7, number])) for number in range(40)]


# ---- pictures


def test_pictures_differ(drawn):
    for picture in drawn:
        assert picture.shape == (120, 160, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)


@pytest.mark.parametrize("name", demo.EDITS)
def test_edits_change_what_they_say(drawn, name):
    rng = np.random.default_rng(1)
    for array in drawn[:10]:
        picture = Image.fromarray(array)
        edited = demo.EDITS[name].change(picture, rng)
        assert np.array_equal(np.asarray(picture), array)
        if name == "mirrored":
            assert np.array_equal(np.asarray(edited), array[:, ::-1])
        elif name == "grey":
            assert edited.mode == "L"
        elif name == "cropped":
            assert np.array_equal(np.asarray(edited), array[2:-2, 3:-3])
        elif name == "smaller":
            back = edited.resize(picture.size)
            assert 60 < edited.width < 130
            assert max(ImageStat.Stat(ImageChops.difference(back, picture)).mean) < 12
        elif name == "brightness":
            ratio = np.asarray(edited).mean() / array.mean()
            assert 0.65 < ratio < 0.75 or 1.05 < ratio < 1.35
        else:
            assert np.array_equal(np.asarray(edited), array)


# ---- the whole


@pytest.fixture(scope="module")
def finished(snip, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, snip("demo", "--out", out, "--pictures", DRAWN)


@pytest.fixture(scope="module")
def names(finished):
    """What each row shows, and how it was made: from the names of the files."""
    paths = pq.read_table(finished[0] / "embedded" / "metadata")["path"].to_pylist()
    return [re.fullmatch(r".*/(\d{6})_(\w+)\.(?:jpg|webp)", path).groups() for path in paths]


def test_the_demo_plants_what_it_says(finished, names):
    out, done = finished
    assert f"drawing {DRAWN} pictures and {8 * DRAWN // 5} copies of them\n" in done.stdout
    for edit in demo.EDITS:
        assert sum(name == edit for _, name in names) == DRAWN // 5
    assert sorted(picture for picture, name in names if name == "original") == [
        f"{number:06d}" for number in range(DRAWN)
    ]
    for path in sorted((out / "photos").rglob("*_exact.jpg")):
        assert path.read_bytes() == path.with_stem(f"{path.stem[:6]}_original").read_bytes()
    assert Image.open(out / "pictures.png").size == (9 * 80, 6 * 60)


def test_the_demo_shows_each_command_and_what_it_said(finished):
    out, done = finished
    shown = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ snip ")]
    assert shown == ["embed", "dedup", "report", "apply", "train", "compress", "index", "dedup"]
    for name in ("embedded", "clean", "encoder", "descriptors", "index", "adc"):
        assert (out / name / "snip.json").is_file()
    assert not (out / "work").exists()


def test_the_links_are_those_of_the_kept_rows(finished, names):
    out, _ = finished
    is_dup = np.load(out / "clean" / "is_dup.npy")
    kept = sorted("_".join(name) for name, gone in zip(names, is_dup, strict=True) if not gone)
    links = [path for path in (out / "chosen").rglob("*") if path.is_symlink()]
    assert sorted(path.stem for path in links) == kept
    assert all(path.resolve().is_file() for path in links)


def test_the_report_shows_those_pictures(finished, browser):
    """What the command printed and the page in a browser: all pictures there, no request."""
    out, done = finished
    shown = re.search(r"pictures of (\d+) of the (\d+) rows shown", done.stdout)
    assert shown[1] == shown[2]
    path = out / "clean" / "report.html"
    assert f"look at it, in a browser: {path}\n" in done.stdout
    with browser.open(path.as_uri()) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wait_until(page, "[...document.images].every(i => i.complete && i.naturalWidth)")
        images = page.locator(".tile img")
        assert images.count() == page.locator(".tile").count() > 50
        assert all(box["width"] > 50 for box in (images.nth(n).bounding_box() for n in (0, 20, 49)))
        assert page.asked == []


def test_what_it_suggests_runs(finished, snip):
    _, done = finished
    lines = done.stdout.partition("what to try next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [words[1] for words in commands] == ["top", "why", "audit", "search"]
    said = [snip(*words[1:]).stdout for words in commands]
    for text, words in zip(said, ("dup_count", "row 0 is ", "passed", "000"), strict=True):
        assert words in text


def test_the_counts_are_true(finished, names):
    """Count again from the files, in plain Python."""
    out, done = finished
    row_of = {name: row for row, name in enumerate(names)}
    for way, folder in (("join", "clean"), ("codes", "adc")):
        groups = pq.read_table(out / folder / "groups.parquet").to_pylist()
        group = {row["row"]: row["group"] for row in groups}
        gone = [row for row in groups if row["is_dup"]]
        right = sum(names[row["row"]][0] == names[row["representative"]][0] for row in gone)
        percent = f"({100 * right / len(gone):.1f} %)"
        assert f"{way}: {len(gone):,} rows removed, {right:,} of them {percent}" in done.stdout
        for edit in demo.EDITS:
            copies = [row for row, name in enumerate(names) if name[1] == edit]
            originals = [row_of[names[row][0], "original"] for row in copies]
            together = sum(
                row in group and group[row] == group.get(original)
                for row, original in zip(copies, originals, strict=True)
            )
            (line,) = (line for line in done.stdout.splitlines() if f"copies, {edit} " in line)
            words = line.split()
            assert words[:3] == [str(DRAWN // 5), "copies,", edit]
            assert words[3 if way == "join" else 5] == f"{100 * together / len(copies):.1f}"
    is_dup = np.load(out / "clean" / "is_dup.npy")
    stays = [names[row][0] for row in np.flatnonzero(~is_dup)]
    assert (
        f"{len(stays)} rows are kept, of {DRAWN} pictures drawn: "
        f"{len(stays) - len(set(stays))} more than one a picture, "
        f"{DRAWN - len(set(stays))} pictures lost"
    ) in done.stdout


def test_the_demo_finds_most_of_what_it_planted(finished):
    _, done = finished
    found = {}
    for edit in demo.EDITS:
        line = next(line for line in done.stdout.splitlines() if f"copies, {edit} " in line)
        found[edit] = float(line.split()[3])
    for edit in ("exact", "jpeg", "webp", "smaller", "brightness", "grey"):
        assert found[edit] >= 95
    assert found["mirrored"] <= 5  # as it says
    assert "(100.0 %) for a row of the same picture" in done.stdout


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


def test_without_pillow_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SnipError, match=r"needs Pillow: pip install 'snipdedup-toolkit\[images"):
        snipdedup.demo.run(Demo(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_or_is_stopped_stops_the_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.cli, "run", lambda words: 1)
    with pytest.raises(SnipError, match=r"the demo stopped at: snip embed .*photos --out"):
        demo.run(Demo(out=str(tmp_path / "out"), pictures=50))
    assert not (tmp_path / "out" / "snip.json").exists()
    monkeypatch.setattr(demo.cli, "run", lambda words: 130)
    with pytest.raises(KeyboardInterrupt):
        demo.run(Demo(out=str(tmp_path / "out"), pictures=50))


def test_a_stopped_demo_keeps_its_pictures_and_overwrite_replaces_them(monkeypatch, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(demo.cli, "run", lambda words: 1)
    seen = []
    for _ in range(2):
        with pytest.raises(SnipError, match="the demo stopped at"):
            demo.run(Demo(out=str(out), pictures=60))
        paths = (out / "photos").rglob("*.*")
        seen.append({path: path.stat().st_mtime_ns for path in paths})
    assert seen[0] == seen[1]
    with pytest.raises(SnipError, match="the demo stopped at"):
        demo.run(Demo(out=str(out), pictures=50, overwrite=True))
    left = {path.stem[:6] for path in (out / "photos").rglob("*_original.jpg")}
    assert left == {f"{number:06d}" for number in range(50)}


def test_a_demo_that_was_stopped_goes_on(monkeypatch, tmp_path, capsys):
    out, real, done = tmp_path / "out", demo.cli.run, []

    def stops(words):
        return 130 if any(word.endswith("/adc") for word in words) else real(words)

    monkeypatch.setattr(demo.cli, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        demo.run(Demo(out=str(out), pictures=50))
    parts = ("photos", "embedded", "clean", "chosen", "encoder", "index")
    before = {p: p.lstat().st_mtime_ns for part in parts for p in (out / part).rglob("*.*")}
    # a page is made anew, and so is the list of files that are left
    before = {p: at for p, at in before.items() if p.name not in ("report.html", *NOTES)}
    assert len(before) > 100

    def counts(words):
        done.append(words[0])
        return real(words)

    monkeypatch.setattr(demo.cli, "run", counts)
    capsys.readouterr()
    assert "pictures lost" in demo.run(Demo(out=str(out), pictures=50))
    assert done == ["embed", "dedup", "report", "apply", "train", "compress", "index", "dedup"]
    assert capsys.readouterr().out.count("already") == 6
    assert before == {p: p.lstat().st_mtime_ns for p in before}
