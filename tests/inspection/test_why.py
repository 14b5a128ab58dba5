"""`snip why`: groups worked by hand, key frames against brute force, keys, pages and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from odd_files import write_photos

import snipdedup
from snipdedup.errors import SnipError

# Degrees: neighbours of one list are 10 apart (cosine .985), the next but one 20 (.940).
ANGLES = [0, 10, 20, 90, 180, 190, 180]
NEAR, NEXT = np.float32(np.cos(np.radians(10))), np.float32(np.cos(np.radians(20)))


@pytest.fixture
def made(tmp_path):
    """Rows on a circle, their metadata, and how to run snip dedup on them."""
    turns = np.radians(np.array(ANGLES, np.float64))
    rows = np.stack([np.cos(turns), np.sin(turns)], 1)
    truth.save_shards(tmp_path / "img_emb", rows, [3])
    (tmp_path / "metadata").mkdir()
    table = pa.table(
        {
            "filename": [f"{n}.jpg" if n != 6 else "4.jpg" for n in range(len(rows))],
            "width": [100, 300, 200, 1, 7, 7, 7],
            "caption": ["<b>x</b>", None, "two\nlines", "c", "d", "e", "f"],
        }
    )
    pq.write_table(table, tmp_path / "metadata" / "m.parquet")

    def run(*words):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = ["--metadata", tmp_path / "metadata", "--threshold", 0.95, "--out", folder]
        status, _, said = truth.snip("dedup", tmp_path / "img_emb", *given, *words)
        assert status == 0, said
        return folder

    return tmp_path, run


def test_star_worked_by_hand(made):
    _, dedup = made
    out = dedup()
    one, two, three = snipdedup.why(out, [1, 2, "3.jpg"]).reasons
    assert (one.row.removed, one.row.key, one.row.shard) == (True, "1.jpg", "img_emb_0.npy")
    # Rows 0 and 2 both match row 1 at .985 and stay; the smaller one is named.
    assert (one.representative, one.similarity, one.group) == (0, NEAR, 0)
    assert (one.group_rows, one.matches) == (3, 2)
    assert [(m.row, m.cosine, m.removed) for m in one.members] == [
        (0, NEAR, False),
        (2, NEAR, False),
    ]
    assert one.why == "it duplicates row 0 (0.jpg), which is kept: cosine 0.984808, threshold 0.95"
    assert one.keep == "first: row 0 (0.jpg) goes before row 1 (1.jpg)"
    assert (two.row.removed, two.representative, two.similarity) == (False, None, None)
    assert two.why == "no kept row of its group that goes before it matches it"
    assert [(m.row, m.cosine) for m in two.members] == [(1, NEAR), (0, NEXT)]
    assert two.matches == 1
    assert (three.row.removed, three.group, three.members) == (False, None, [])
    assert three.why == "no other row was found that reaches the threshold 0.95"
    zero = snipdedup.why(out, 0).reasons[0]
    assert zero.why.endswith("before it matches it; 1 removed rows have it as representative")


def test_keep_by_a_column_says_its_values(made):
    _, dedup = made
    reasons = snipdedup.why(dedup("--keep", "max:width,last"), "0,2,4").reasons
    for reason, width in zip(reasons[:2], (100, 200), strict=True):
        name = f"row {reason.row.row} ({reason.row.row}.jpg, width {width})"
        assert reason.keep == f"max:width,last: row 1 (1.jpg, width 300) goes before {name}"
        assert reason.representative == 1
    # Row 6 equals row 4, and goes first as both are as wide: `last`.
    assert (reasons[2].representative, reasons[2].similarity) == (6, 1)
    assert "row 6 (4.jpg, width 7) goes before row 4 (4.jpg, width 7)" in reasons[2].keep


def test_components_name_a_row_below_the_threshold(made):
    _, dedup = made
    (two,) = snipdedup.why(dedup("--grouping", "components", "--key", "caption"), 2).reasons
    assert (two.row.key, two.row.picture) == ("two\nlines", "2.jpg")
    assert (two.representative, two.similarity) == (0, NEXT)
    assert two.why.endswith("; below the threshold: other rows of the group connect the two")
    assert two.keep == "first: row 0 (<b>x</b>) goes before row 2 (two lines)"


def test_a_row_of_a_reference(made):
    folder, dedup = made
    np.save(folder / "other.npy", np.array([[0.0, 1.0], [1.0, 0.0]]))
    (three,) = snipdedup.why(dedup("--reference", folder / "other.npy"), 3).reasons
    assert three.why.startswith(
        f"it duplicates row 0 of the reference {folder}/other.npy: cosine 1"
    )
    assert three.representative == ~0
    assert three.keep == ""


def test_second_features_are_said(made):
    folder, dedup = made
    other = np.array([[1.0, 0], [0.6, 0.8], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1]])
    np.save(folder / "other.npy", other)
    out = dedup("--also", f"{folder}/other.npy:0.7")
    one, six = snipdedup.why(out, [1, 6]).reasons
    # Row 1 matches row 2 in both (.985, .8), row 0 in the first only (.985, .6).
    assert not one.row.removed
    assert [(m.row, m.removed) for m in one.members] == [(2, True)]
    (two,) = snipdedup.why(out, 2).reasons
    assert two.why.endswith(f"threshold 0.95; in {folder}/other.npy: cosine 0.800000")
    assert two.keep == "first: row 1 (1.jpg) goes before row 2 (2.jpg)"
    assert six.group is None  # an exact copy in the first features only


def test_decisions_of_a_person_are_said(made):
    folder, dedup = made
    (folder / "told.csv").write_text("row,decision\n1,keep\n3,drop\n6,drop\n")
    reasons = snipdedup.why(dedup("--decisions", folder / "told.csv"), [0, 1, 3, 6, 5]).reasons
    assert [reason.row.removed for reason in reasons] == [False, False, True, True, True]
    assert reasons[0].why == (
        "no kept row of its group that goes before it matches it (decisions apart)"
    )
    assert reasons[1].why == "it was told to stay (--decisions)"
    assert reasons[2].why == "it was told to go (--decisions); no kept row matches it"
    assert reasons[2].representative is reasons[2].similarity is None
    assert reasons[3].why.startswith("it was told to go (--decisions); it duplicates row 4 (4.jpg)")
    assert (reasons[3].representative, reasons[3].keep) == (4, "")
    assert reasons[4].keep == "first: row 4 (4.jpg) goes before row 5 (5.jpg)"


def test_semdedup_and_rows_that_cannot_be_compared(made):
    folder, dedup = made
    out = dedup("--method", "semdedup", "--clusters", 1)
    removed = np.flatnonzero(np.load(out / "is_dup.npy")).tolist()
    assert removed
    for reason in snipdedup.why(out, removed).reasons:
        assert reason.why.startswith(f"it duplicates row {reason.representative} (")
        assert reason.keep == ""
    rows = np.load(folder / "img_emb" / "img_emb_0.npy")
    rows[1] = 0
    np.save(folder / "img_emb" / "img_emb_0.npy", rows)
    out = dedup("--bad_rows", "keep")
    assert snipdedup.why(out, 1).reasons[0].why.startswith("it cannot be compared")


def test_a_run_that_compared_codes_knows_no_cosine(small_index, tmp_path):
    index, _ = small_index
    assert truth.snip("dedup", "--index", index.folder, "-o", tmp_path / "codes")[0] == 0
    gone = int(np.flatnonzero(np.load(tmp_path / "codes" / "is_dup.npy"))[0])
    result = snipdedup.why(tmp_path / "codes", gone)
    assert result.note == "cosines are not known: the run compared codes"
    (reason,) = result.reasons
    assert f"row {reason.representative}, which is kept: not verified" in reason.why
    assert reason.members
    assert {member.cosine for member in reason.members} == {None}
    assert f"?  row {reason.representative}: kept, the representative" in result.text


def test_text_page_and_json(made):
    folder, dedup = made
    out = dedup()
    status, said, _ = truth.snip("why", out, "key:4.jpg", "--html", folder / "why.html")
    assert status == 0
    # Two rows have this key: both are listed.
    assert said.startswith("row 4 is kept\n")
    assert "\nrow 6 is removed\n  key      4.jpg\n  place    img_emb_1.npy row 3\n" in said
    assert "\n    1.000000  row 4 (4.jpg): kept, the representative\n" in said
    page = (folder / "why.html").read_text("utf-8")
    assert page.count('<figure class="tile') == 6  # two sections of three rows
    assert truth.snip("why", out, 0, "--html", folder / "why.html")[0] == 0
    page = (folder / "why.html").read_text("utf-8")
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<b>x" not in page
    status, said, _ = truth.snip("why", out, "0,3.jpg", "--json")
    rows = json.loads(said)["rows"]
    assert [row["row"]["row"] for row in rows] == [0, 3]
    assert rows[0]["members"][0]["cosine"] == pytest.approx(NEAR)
    result = snipdedup.why(out, 1)
    assert str(result) == result.text


def test_without_features_and_metadata_what_out_knows_is_said(made):
    folder, dedup = made
    out, by_width = dedup(), dedup("--keep", "max:width")
    shutil.move(folder / "img_emb", folder / "moved")
    shutil.rmtree(folder / "metadata")
    result = snipdedup.why(out, "1.jpg")
    assert result.note.startswith("cosines are not known: ")
    (one,) = result.reasons
    assert [(m.row, m.key, m.cosine) for m in one.members] == [
        (0, "0.jpg", NEAR),
        (2, "2.jpg", None),
    ]
    assert one.matches is None
    known = snipdedup.why(out, "1.jpg", features=folder / "moved").reasons[0]
    assert [m.cosine for m in known.members] == [NEAR, NEAR]
    for left in (True, False):  # widths of the kept rows only, then of none
        (zero,) = snipdedup.why(by_width, "0.jpg").reasons
        assert zero.why.startswith("it duplicates row 1 (1.jpg" + (", width 300)" if left else ")"))
        assert zero.keep == ""
        shutil.rmtree(by_width / "metadata", ignore_errors=True)
    np.save(folder / "moved" / "img_emb_0.npy", np.eye(3, 2))
    with pytest.raises(SnipError, match="the features are not those that were searched"):
        snipdedup.why(out, "1.jpg", features=folder / "moved")


def test_report_takes_keys(made):
    folder, dedup = made
    out = dedup()
    words = ("--html", folder / "r.html", "--rows")
    assert truth.snip("report", out, *words, "3.jpg,row:1")[0] == 0
    page = (folder / "r.html").read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    assert [entry[:2] for entry in json.loads(data)["asked"]] == [[1, 0], [3, 3]]  # 3 is kept
    status, _, said = truth.snip("report", out, *words, "33.jpg")
    assert (status, said.count("\n")) == (1, 1)
    assert "has the key '33.jpg'; the nearest keys: '3.jpg'" in said


def test_refusals(made):
    folder, dedup = made
    out = dedup()
    for words, text in (
        ([out, "44.jpg"], "no row of .* has the key '44.jpg'; the nearest keys: '4.jpg'"),
        ([out, 7], "no row 7 in .*: rows 0 to 6"),
        ([folder / "img_emb", 1], "expected a finished dedup folder"),
        ([out, 1, "--html", out / "groups.parquet"], "lies in the input folder"),
    ):
        status, _, said = truth.snip("why", *words)
        assert (status, said.count("\n")) == (1, 1)
        assert re.search(text, said), said


def test_ten_rows_of_key_frames_are_as_brute_force_says(data, tmp_path):
    out, limit = tmp_path / "out", np.float32(0.95)
    result = snipdedup.dedup(str(data / "keyframes"), threshold=0.95, out=str(out))
    paths = sorted((data / "keyframes" / "img_emb").glob("*.npy"))
    x = np.concatenate([np.load(path) for path in paths]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    table = sorted((data / "keyframes" / "metadata").glob("*.parquet"))
    keys = pa.concat_tables(map(pq.read_table, table))["key"].to_pylist()
    rng = np.random.default_rng(17)
    removed, kept = np.flatnonzero(result.is_dup), np.flatnonzero(~result.is_dup)
    rows = [*rng.choice(removed, 6, False).tolist(), *rng.choice(kept, 3, False).tolist()]
    groups = pq.read_table(out / "groups.parquet")
    rows.append(int(groups["row"][groups["is_dup"].index(pa.scalar(False)).as_py()].as_py()))
    reasons = snipdedup.why(str(out), [keys[row] for row in rows]).reasons
    assert [reason.row.row for reason in reasons] == rows
    for row, reason in zip(rows, reasons, strict=True):
        cosine = (x @ x[row]).astype(np.float32)
        others = np.flatnonzero(cosine >= limit)
        others = others[others != row]
        assert reason.row.removed == result.is_dup[row]
        assert (reason.matches or 0) == len(others)
        shown = {member.row: member.cosine for member in reason.members}
        assert shown.keys() >= set(others.tolist()) or len(shown) == 1000
        for member in reason.members:
            assert member.cosine == pytest.approx(float(cosine[member.row]), abs=1e-6)
            assert member.key == keys[member.row]
            assert member.removed == result.is_dup[member.row]
        staying = others[~result.is_dup[others]]
        if reason.row.removed:
            best = staying[cosine[staying] == cosine[staying].max()]
            assert reason.representative == best.min()
            assert reason.similarity == pytest.approx(float(cosine[best[0]]), abs=1e-6)
            assert f"row {staying.min()} (" in reason.keep  # keep first
        else:
            assert not len(staying)


def test_pictures_of_snip_embed_are_named_and_shown(browser, tmp_path):
    pytest.importorskip("PIL")
    write_photos(tmp_path / "photos")
    assert truth.snip("embed", tmp_path / "photos", "-o", tmp_path / "embedded")[0] == 0
    assert truth.snip("dedup", tmp_path / "embedded", "-o", tmp_path / "clean")[0] == 0
    gone = int(np.flatnonzero(np.load(tmp_path / "clean" / "is_dup.npy"))[0])
    (reason,) = snipdedup.why(tmp_path / "clean", gone, html=tmp_path / "why.html").reasons
    for member in (reason.row, *reason.members):
        picture = Path(member.picture)
        assert picture.is_file()
        assert picture.is_relative_to(tmp_path / "photos")
        assert picture.stem == Path(member.key).name
    with browser.open((tmp_path / "why.html").as_uri(), width=390) as page:
        shown = page.eval_on_selector_all(".tile img", "all => all.map(i => i.naturalWidth)")
        assert len(shown) == 1 + len(reason.members)
        assert min(shown) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert f"It duplicates row {reason.representative} (" in page.inner_text("main")
