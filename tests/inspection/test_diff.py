"""What changed between two runs: by sets in Python, over runs made and cases worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.groups.members import Members
from snipdedup.inspection.diff import other_representatives, regrouped

ROWS = 900


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: OUT} of the same rows, their set, and one of other rows."""
    folder = tmp_path_factory.mktemp("diff")
    x = truth.clustered(ROWS, 12, 4, clusters=150, noise=0.45, copies=0.1)
    truth.save_shards(folder / "set", x, [500])
    outs = {}
    for name, words in {
        "loose": ["--threshold", 0.85],
        "strict": ["--threshold", 0.93],
        "last": ["--threshold", 0.85, "--keep", "last"],
        "components": ["--threshold", 0.85, "--grouping", "components"],
        "again": ["--threshold", 0.85, "--threads", 1],
    }.items():
        outs[name] = folder / name
        assert truth.snip("dedup", folder / "set", *words, "--out", outs[name])[0] == 0
    return outs, folder, x


def found(one, other, *words):
    status, said, complaint = truth.snip("diff", one, other, *words, "--json")
    assert (status, complaint) == (0, "")
    return json.loads(said)


def partition(groups):
    """{row: frozenset of its group} for all rows."""
    held = {}
    for member in groups:
        held.setdefault(member["group"], set()).add(member["row"])
    whole = {row: frozenset(rows) for rows in held.values() for row in rows}
    return {row: whole.get(row, frozenset([row])) for row in range(ROWS)}


def torn(one, other):
    """[(label, rows, parts)] of groups of one that are not whole in other."""
    found = []
    for rows in {rows for rows in one.values() if len(rows) > 1}:
        parts = len({other[row] for row in rows})
        if parts > 1:
            found.append((min(rows), len(rows), parts))
    return sorted(found, key=lambda g: (-g[1], g[0]))


@pytest.mark.parametrize("other", ["strict", "last", "components", "again"])
@pytest.mark.parametrize("turned", [False, True])
def test_differences_are_those_of_sets(runs, other, turned):
    pair = [runs[0]["loose"], runs[0][other]][:: -1 if turned else 1]
    diff = found(*pair, "-n", ROWS)
    tables = [pq.read_table(out / "groups.parquet").to_pylist() for out in pair]
    stands = [{m["row"]: m for m in t if m["is_dup"]} for t in tables]
    expected = {
        "newly_removed": sorted(stands[1].keys() - stands[0].keys()),
        "newly_staying": sorted(stands[0].keys() - stands[1].keys()),
        "other_representative": sorted(
            row
            for row in stands[0].keys() & stands[1].keys()
            if stands[0][row]["representative"] != stands[1][row]["representative"]
        ),
    }
    for name, rows in expected.items():
        assert diff[name]["rows"] == len(rows)
        assert [entry["row"] for entry in diff[name]["examples"]] == rows
        for entry in diff[name]["examples"]:
            shard, place = divmod(entry["row"], 500)
            assert (entry["shard"], entry["shard_row"]) == (f"img_emb_{shard}.npy", place)
            for stand, representative, similarity in zip(
                stands, entry["representatives"], entry["similarities"], strict=True
            ):
                if entry["row"] in stand:
                    assert representative == stand[entry["row"]]["representative"]
                    assert similarity == pytest.approx(stand[entry["row"]]["similarity"])
                else:
                    assert representative in (None, entry["row"])
    parts = [partition(table) for table in tables]
    for name, (a, b) in {"split": parts, "merged": parts[::-1]}.items():
        rows = [(g["group"], g["rows"], g["parts"]) for g in diff[name]["examples"]]
        assert rows == torn(a, b)
        assert diff[name]["groups"] == len(rows)
    changes = {"strict": ["threshold"], "last": ["keep"], "components": ["grouping"], "again": []}
    assert list(diff["settings"]) == changes[other]
    for name, values in diff["counts"].items():
        for value, out in zip(values, pair, strict=True):
            assert value == json.loads((out / "snip.json").read_text())["counts"][name]


def test_a_lower_threshold_splits_nothing_and_a_higher_one_merges_nothing(runs):
    diff = found(runs[0]["loose"], runs[0]["strict"])
    assert diff["split"]["groups"] > 0
    assert diff["merged"]["groups"] == 0
    assert len(diff["newly_staying"]["examples"]) == 5
    turned = found(runs[0]["strict"], runs[0]["loose"])
    assert (turned["split"], turned["merged"]) == (diff["merged"], diff["split"])


def test_the_text_says_the_same(runs):
    outs = runs[0]
    diff = found(outs["loose"], outs["strict"], "-n", 1)
    status, said, _ = truth.snip("diff", outs["loose"], outs["strict"], "-n", 1)
    assert status == 0
    lines = said.splitlines()
    assert lines[:2] == [f"1: {outs['loose']}", f"2: {outs['strict']}"]
    assert [line.split() for line in lines[3:5]] == [
        ["threshold", "0.85", "0.93"],
        ["rows", "900", "900"],
    ]
    assert f"{diff['newly_staying']['rows']} rows removed in 1 and kept in 2" in lines
    entry = diff["newly_staying"]["examples"][0]
    assert (
        f"  row {entry['row']} ({entry['shard']} row {entry['shard_row']}): removed in 1 for row "
        f"{entry['representatives'][0]} (cosine {entry['similarities'][0]:.4f}), kept in 2"
    ) in lines
    group = diff["split"]["examples"][0]
    assert f"  group {group['group']} ({group['rows']} rows) is in {group['parts']} parts" in lines


def test_regrouping_by_hand():
    def groups(label):
        rows = np.array(sorted(label))
        of = np.array([label[row] for row in rows.tolist()], np.int64)
        return Members(rows.astype(np.int64), of, of, np.ones(len(rows), np.float32), rows != of)

    one = groups({0: 0, 1: 0, 2: 0, 5: 5, 6: 5, 7: 7, 8: 7})
    other = groups({0: 0, 1: 0, 7: 7, 8: 7, 5: 5, 6: 5, 9: 5})
    assert regrouped(one, other) == [{"group": 0, "rows": 3, "parts": 2}]
    assert regrouped(other, one) == [{"group": 5, "rows": 3, "parts": 2}]
    nothing = groups({})
    assert regrouped(nothing, one) == []
    assert [g["parts"] for g in regrouped(one, nothing)] == [3, 2, 2]
    goes = np.ones(10, bool)
    assert other_representatives(one, other, goes).tolist() == []
    moved = other._replace(representative=other.representative + 1)
    assert other_representatives(one, moved, goes).tolist() == [0, 1, 5, 6, 7, 8]


@pytest.mark.parametrize("change", ["rows", "values", "shards"])
def test_runs_over_other_rows_are_refused(runs, tmp_path, change):
    outs, _, x = runs
    cuts = [400, 500] if change == "shards" else [500]
    x = {"rows": x[:-1], "values": -x, "shards": x}[change]
    truth.save_shards(tmp_path / "set", x, cuts)
    words = ("dedup", tmp_path / "set", "--threshold", 0.85, "--out", tmp_path / "o")
    assert truth.snip(*words)[0] == 0
    status, said, complaint = truth.snip("diff", outs["loose"], tmp_path / "o")
    assert (status, said) == (1, "")
    assert "are not runs over the same rows" in complaint
    what = {"rows": "img_emb_1.npy has rows 400", "values": "has checksum", "shards": "2 shards"}
    assert what[change] in complaint


def test_renamed_features_are_the_same_rows(runs, tmp_path):
    outs, _, x = runs
    (tmp_path / "set").mkdir()
    for number, part in enumerate(np.split(x, [500])):
        np.save(tmp_path / "set" / f"other_{number}.npy", part)
    words = ("dedup", tmp_path / "set", "--threshold", 0.85, "--out", tmp_path / "o")
    assert truth.snip(*words)[0] == 0
    assert found(outs["loose"], tmp_path / "o")["newly_removed"]["rows"] == 0


def test_refusals(runs, tmp_path):
    assert truth.snip("diff", runs[0]["loose"])[0] == 2
    status, _, complaint = truth.snip("diff", runs[0]["loose"], tmp_path)
    assert status == 1
    assert "expected a finished dedup folder" in complaint
