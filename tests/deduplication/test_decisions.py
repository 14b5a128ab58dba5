"""Rows that a person tells to stay or to go, against the rule applied by hand; and refusals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

import snipdedup
from snipdedup.groups import pairs, star
from snipdedup.storage.out_folder import read_manifest

ROWS, THRESHOLD = 300, 0.9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A set with copies, pairs and chains; its table of cosines; and its OUT."""
    folder = tmp_path_factory.mktemp("decisions")
    rows = truth.clustered(ROWS, 16, 4, clusters=30, noise=0.35, copies=0.1)
    truth.save_shards(folder / "set" / "img_emb", rows, [100])
    (folder / "set" / "metadata").mkdir()
    keys = [f"k{row}" for row in range(ROWS)]
    keys[5] = keys[6] = "twice"
    keys[7] = "=1+1"
    table = pa.table({"key": keys, "size": [(row * 37) % 100 for row in range(ROWS)]})
    pq.write_table(table, folder / "set" / "metadata" / "m.parquet")
    for grouping in ("star", "components"):
        words = ("--threshold", THRESHOLD, "--grouping", grouping, "--out", folder / grouping)
        assert truth.snip("dedup", folder / "set", *words)[0] == 0
    return folder, truth.cosine_table(rows)


def decided(table, grouping, order, keep, drop):
    """The rule by hand: rows that are kept, after a person's decisions."""
    match = table >= np.float32(THRESHOLD)
    label = truth.components(ROWS, np.argwhere(match))
    if grouping == "star":
        stays = truth.star(table, THRESHOLD, order)[1]
    else:
        stays = np.zeros(ROWS, bool)
        stays[[next(row for row in order if label[row] == one) for one in set(label)]] = True
    stays[keep] = True
    stays[drop] = False
    for row in order:
        like = match[row] if grouping == "star" else label == label[row]
        if row not in drop and not (stays & like).any():
            stays[row] = True
    return stays, label


def write_csv(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


@pytest.mark.parametrize("grouping", ["star", "components"])
@pytest.mark.parametrize("keep_rule", ["first", "max:size"])
@pytest.mark.parametrize("large", [False, True])
def test_what_was_decided_holds_and_the_rest_follows_the_rule(
    base, tmp_path, monkeypatch, grouping, keep_rule, large
):
    folder, table = base
    if large:  # the way of large groups
        monkeypatch.setattr(pairs, "LISTED_GROUP", 2)
        monkeypatch.setattr(star, "TABLE_GROUP", 8)
    order = np.arange(ROWS)
    if keep_rule != "first":
        order = order[np.lexsort((order, -((order * 37) % 100)))]
    rng = np.random.default_rng(1)
    chosen = rng.permutation(ROWS)[:80]
    keep, drop = np.sort(chosen[:40]), np.sort(chosen[40:])
    lines = [f"{row},keep," for row in keep] + [f",drop,k{row}" for row in drop if row > 7]
    lines += [f"{row},drop," for row in drop if row <= 7]
    marks = write_csv(tmp_path / "marks.csv", ["row,decision,key", *lines])
    words = ("--decisions", marks, "--keep", keep_rule, "--out", tmp_path / "out")
    status, said, error = truth.snip("dedup", folder / grouping, *words)
    assert status == 0, error
    assert "decisions" in said
    assert "told to stay, 40 to go" in said

    stays, label = decided(table, grouping, order, keep, drop)
    assert (np.load(tmp_path / "out" / "is_dup.npy") == ~stays).all()
    groups = pq.read_table(tmp_path / "out" / "groups.parquet")
    told = dict(zip(groups["row"].to_pylist(), groups["decision"].to_pylist(), strict=True))
    assert {row for row, word in told.items() if word == "drop"} == set(drop.tolist())
    assert {row for row, word in told.items() if word == "keep"} == set(keep) & set(told)
    alone = 0
    for row, other, cosine in zip(
        *(groups[name].to_pylist() for name in ("row", "representative", "similarity")), strict=True
    ):
        if stays[row] or other == row:
            assert other == row
            assert stays[row] or row in drop
            alone += not stays[row]
            continue
        assert stays[other]
        assert label[other] == label[row]
        if grouping == "star":
            assert cosine == table[row][stays].max() >= np.float32(THRESHOLD)
    assert alone
    counts = read_manifest(tmp_path / "out", "dedup")["counts"]
    assert (counts["told_to_stay"], counts["told_to_go"], counts["removed_alone"]) == (
        40, 40, alone,
    )  # fmt: skip
    written = pq.read_table(tmp_path / "out" / "metadata" / "m.parquet")
    assert written.num_rows == stays.sum()
    assert sum(written["dup_count"].to_pylist()) == (~stays).sum() - alone
    status, said, _ = truth.snip("audit", tmp_path / "out", folder / "set")
    assert status == 0, said
    assert "40 rows are told to go" in said
    for command in ("report", "top"):
        assert truth.snip(command, tmp_path / "out")[0] == 0


def test_decisions_hold_on_at_another_threshold_and_newer_ones_come_last(base, tmp_path):
    folder, _ = base
    removed = np.flatnonzero(np.load(folder / "star" / "is_dup.npy"))[:4].tolist()
    one = write_csv(tmp_path / "1.csv", ["row,decision", *(f"{row},keep" for row in removed)])
    assert truth.snip("dedup", folder / "star", "--decisions", one, "--out", tmp_path / "a")[0] == 0
    two = write_csv(tmp_path / "2.csv", ["key;decision", f"k{removed[0]};drop", f"k{removed[1]};"])
    words = ("--decisions", two, "--threshold", 0.95, "--out", tmp_path / "b")
    assert truth.snip("dedup", tmp_path / "a", *words)[0] == 0
    is_dup = np.load(tmp_path / "b" / "is_dup.npy")
    assert is_dup[removed].tolist() == [True, False, False, False]
    text = (tmp_path / "b" / "decisions.csv").read_text()
    assert text.split() == [
        "row,decision",
        f"{removed[0]},drop",
        *(f"{r},keep" for r in removed[1:]),
    ]
    again = snipdedup.open_result(tmp_path / "b")
    assert (again.is_dup == is_dup).all()
    assert not again.at(0.97).is_dup[removed[1:]].any()
    assert truth.snip("audit", tmp_path / "b")[0] == 0
    said = truth.snip("diff", tmp_path / "a", tmp_path / "b")[1]
    assert f"row {removed[0]} " in said


def test_what_goes_without_a_duplicate_that_stays_is_named_so(base, tmp_path):
    folder, table = base
    lone = int(np.flatnonzero((table >= np.float32(THRESHOLD)).sum(1) == 1)[0])
    marks = write_csv(tmp_path / "m.csv", ["row,decision", f"{lone},drop"])
    words = ("--decisions", marks, "--out", tmp_path / "out")
    assert truth.snip("dedup", folder / "star", *words)[0] == 0
    said = truth.snip("diff", folder / "star", tmp_path / "out")[1]
    assert "rows kept in 1 and removed in 2" in said
    assert f"row {lone} k{lone}" in said
    assert "removed in 2 for no row: it was told to go" in said
    sheet = ("--sheet", tmp_path / "sheet.csv", "-n", ROWS)
    assert truth.snip("audit", tmp_path / "out", *sheet)[0] == 0
    assert f"\n{lone}," not in (tmp_path / "sheet.csv").read_text("utf-8")


def test_the_audit_sees_a_decision_that_does_not_hold(base, tmp_path):
    folder, _ = base
    row = int(np.flatnonzero(np.load(folder / "star" / "is_dup.npy"))[0])
    marks = write_csv(tmp_path / "marks.csv", ["row,decision", f"{row},keep"])
    words = ("--decisions", marks, "--out", tmp_path / "out")
    assert truth.snip("dedup", folder / "star", *words)[0] == 0
    write_csv(tmp_path / "out" / "decisions.csv", ["row,decision", f"{row},drop"])
    status, said, _ = truth.snip("audit", tmp_path / "out")
    assert status == 1
    assert f"row {row} (" in said
    assert "told to go by decisions.csv, and does not" in said


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["row,decision", "300,keep"], "line 2: expected a row from 0 to 299, found '300'"),
        (["row,decision", "-1,keep"], "expected a row from 0 to 299, found '-1'"),
        (["row,decision", "3,keep", "4,", "3,drop"], "line 4: row 3 is told to be kept and"),
        (["row,key,decision", "3,k3,keep", ",k3,drop"], "line 3: row 3 is told to be kept and"),
        (["row,key,decision", "3,k4,keep"], "row 3 does not have the key 'k4' in this set"),
        (["key,decision", "none,keep"], "no row has the key 'none'"),
        (["key,decision", "twice,keep"], "2 rows have the key 'twice'; name rows by number"),
        (["row,decision", "3,maybe"], "expected keep or drop as decision, found 'maybe'"),
        (["row,decision", ",keep"], "expected a row number or a key, found neither"),
        (["row,verdict", "3,yes"], "it has no column decision"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(base, tmp_path, lines, expected):
    marks = write_csv(tmp_path / "marks.csv", lines)
    words = ("--decisions", marks, "--out", tmp_path / "out")
    status, _, said = truth.snip("dedup", base[0] / "star", *words)
    assert status == 1
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_key_that_a_spreadsheet_was_kept_from_is_that_key(base, tmp_path):
    marks = write_csv(tmp_path / "marks.csv", ["row,key,decision", "7,'=1+1,drop"])
    result = snipdedup.dedup(base[0] / "star", decisions=str(marks), out=str(tmp_path / "out"))
    assert result.is_dup[7]
    for words in (("--weights",), ("--method", "semdedup")):
        given = ("--decisions", marks, "--out", tmp_path / "no", *words)
        assert truth.snip("dedup", base[0] / "set", *given)[0] == 2


def test_rows_of_references_can_be_told_to_stay(base, tmp_path):
    folder, _ = base
    reference = folder / "set" / "img_emb" / "img_emb_0.npy"
    truth.save_shards(tmp_path / "then", np.load(folder / "set/img_emb/img_emb_1.npy"), [])
    words = ("--reference", reference, "--threshold", THRESHOLD)
    assert truth.snip("dedup", tmp_path / "then", *words, "--out", tmp_path / "a")[0] == 0
    groups = pq.read_table(tmp_path / "a" / "groups.parquet").to_pylist()
    rows = [one["row"] for one in groups if one["reference"]][:5]
    marks = write_csv(tmp_path / "m.csv", ["row,decision", *(f"{row},keep" for row in rows)])
    given = ("--decisions", marks, "--out", tmp_path / "b")
    assert truth.snip("dedup", tmp_path / "a", *given)[0] == 0
    changed = np.load(tmp_path / "a/is_dup.npy") != np.load(tmp_path / "b/is_dup.npy")
    assert np.flatnonzero(changed).tolist() == rows
    assert truth.snip("audit", tmp_path / "b")[0] == 0
