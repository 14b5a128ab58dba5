"""The rows that stand for most others, by a plain count over groups.parquet and the metadata."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.deduplication import read_out
from snipdedup.groups.members import Members, no_members
from snipdedup.inspection import top
from snipdedup.inspection.display import terminal_text
from snipdedup.inspection.top import rank_groups, rank_rows

ROWS, THRESHOLD = 900, 0.9
CAPTIONS = ["a red car", "a blue car\nat sea", None, "", "\x1b[31m\u202edanger"]


def write_set(folder, x, seed):
    truth.save_shards(folder / "img_emb", x, [500])
    (folder / "metadata").mkdir()
    rng = np.random.default_rng(seed)
    captions = [CAPTIONS[i] for i in rng.integers(0, len(CAPTIONS), len(x))]
    urls = [f"https://example.org/{i // 2}.jpg" for i in range(len(x))]
    table = pa.table({"uid": [f"u{i}" for i in range(len(x))], "URL": urls, "TEXT": captions})
    for part, rows in enumerate((slice(0, 500), slice(500, None))):
        path = folder / "metadata" / f"m_{part}.parquet"
        pq.write_table(table[rows], path)
    return captions


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(OUT, set, captions) of rows in a few dozen groups."""
    folder = tmp_path_factory.mktemp("top")
    x = truth.clustered(ROWS, 12, 4, clusters=60, noise=0.45, copies=0.1)
    captions = write_set(folder / "set", x, 1)
    words = ("dedup", folder / "set", "--out", folder / "OUT", "--threshold", THRESHOLD)
    assert truth.snip(*words)[0] == 0
    return folder / "OUT", folder / "set", captions


def found(*words):
    status, said, complaint = truth.snip("top", *words, "--json")
    assert (status, complaint) == (0, "")
    return json.loads(said)


def counted(out):
    """{representative: its removed rows}, most first, ties by row."""
    groups = pq.read_table(out / "groups.parquet").to_pylist()
    held = {}
    for member in groups:
        if member["is_dup"]:
            held.setdefault(member["representative"], []).append(member)
    return groups, dict(sorted(held.items(), key=lambda item: (-len(item[1]), item[0])))


@pytest.mark.parametrize("n", [1, 7, 10**6])
def test_entries_are_what_a_plain_count_gives(case, n):
    out, _, captions = case
    groups, expected = counted(out)
    by_row = {member["row"]: member for member in groups}
    entries = found(out, "-n", n)
    assert [entry["row"] for entry in entries] == list(expected)[:n]
    assert len({entry["dup_count"] for entry in entries}) < len(entries) or n == 1  # ties
    for entry in entries:
        removed = expected[entry["row"]]
        cosines = np.array([member["similarity"] for member in removed], np.float32)
        size = sum(g["group"] == by_row[entry["row"]]["group"] for g in groups)
        assert entry["dup_count"] == len(removed)
        assert entry["similarity_mean"] == pytest.approx(cosines.mean(dtype=float), abs=1e-6)
        assert entry["similarity_lowest"] == pytest.approx(cosines.min(), abs=1e-6)
        assert entry["group_rows"] == size
        assert entry["chains"] == (size > 1 + len(removed))
        assert entry["key"] == f"u{entry['row']}"
        shard, start = divmod(entry["row"], 500)
        assert (entry["shard"], entry["shard_row"]) == (f"img_emb_{shard}.npy", start)
        rows = [entry["row"], *sorted(member["row"] for member in removed)]
        counts = Counter(captions[row] for row in rows if captions[row])
        shown = {c["caption"]: c["rows"] for c in entry["captions"]}
        assert shown == dict(counts.most_common(5))
        most = [c["rows"] for c in entry["captions"]]
        assert most == sorted(most, reverse=True)
        urls = list(dict.fromkeys(f"https://example.org/{row // 2}.jpg" for row in rows))
        assert entry["urls"] == urls[:3]


def test_it_does_not_depend_on_batches(case, monkeypatch):
    expected = found(case[0], "-n", 20)
    monkeypatch.setattr(read_out, "BATCH_ROWS", 7)
    monkeypatch.setattr(top, "READ_ROWS", 5)
    assert found(case[0], "-n", 20) == expected


def test_a_ranking_by_hand():
    groups = Members(
        row=np.array([0, 3, 4, 1, 2, 5, 6, 7, 8]),
        group=np.array([0, 0, 0, 1, 1, 5, 5, 5, 5]),
        representative=np.array([0, 0, 0, 2, 2, 5, 5, 7, 7]),
        similarity=np.array([1, 0.9, 1, 0.95, 1, 1, 0.99, 1, 0.97], np.float32),
        is_dup=np.array([0, 1, 1, 1, 0, 0, 1, 0, 1], bool),
    )
    ranking = rank_groups(groups, 9, 0.95)
    assert [one.row for one in ranking] == [0, 2, 5, 7]
    assert [one.dup_count for one in ranking] == [2, 1, 1, 1]
    assert [one.group for one in ranking] == [0, 1, 5, 5]
    assert [one.group_rows for one in ranking] == [3, 2, 4, 4]
    assert [one.chains for one in ranking] == [True, False, True, True]  # below .95; other rows
    assert [one.removed.tolist() for one in ranking] == [[3, 4], [1], [6], [8]]
    assert [one.similarity_mean for one in ranking] == [0.95, 0.95, 0.99, 0.97]
    assert [one.similarity_lowest for one in ranking] == [0.9, 0.95, 0.99, 0.97]
    assert [one.row for one in rank_groups(groups, 9, 0.95, least=2)] == [0]
    assert rank_groups(no_members(), 9, 0.95) == []


def test_many_batches_give_the_ranking_of_all(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 2000)
    group = np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = np.arange(sizes.sum())
    table = {
        "row": row, "group": group, "representative": group, "is_dup": row != group,
        "similarity": np.ones(len(row), np.float32),
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "g.parquet")
    monkeypatch.setattr(read_out, "BATCH_ROWS", 64)
    ranking = rank_rows(tmp_path / "g.parquet", 50, 0.9)
    order = np.lexsort((np.unique(group), 1 - sizes))[:50]
    assert [one.row for one in ranking] == np.unique(group)[order].tolist()
    assert [one.dup_count for one in ranking] == (sizes[order] - 1).tolist()


def test_the_table_is_for_people(case):
    out = case[0]
    status, said, _ = truth.snip("top", out, "-n", 5)
    assert status == 0
    entries = found(out, "-n", 5)
    lines = said.splitlines()
    assert len(lines) == 1 + 5 + 3
    for line, entry in zip(lines[1:6], entries, strict=True):
        words = line.split()
        assert words[:4] == [
            str(entry["row"]), str(entry["dup_count"]),
            f"{entry['similarity_mean']:.4f}", f"{entry['similarity_lowest']:.4f}",
        ]  # fmt: skip
        assert ("yes" in words[4:5]) == entry["chains"]
        assert f"u{entry['row']}" in words
        assert entry["urls"][0] in words
    assert not any(ord(c) < 32 for line in lines for c in line)
    assert "\u202e" not in said


def test_prompts_are_the_most_frequent_captions_a_line_each(case, tmp_path):
    out, folder, _ = case
    path = tmp_path / "new" / "prompts.txt"
    status, said, _ = truth.snip("top", out, "-n", 30, "--prompts", path)
    assert status == 0
    assert f"captions written to {path}" in said
    entries = found(out, "-n", 30)
    expected = [terminal_text(e["captions"][0]["caption"]) for e in entries if e["captions"]]
    assert path.read_text(encoding="utf-8").splitlines() == expected
    assert "a blue car at sea" in expected
    assert len(expected) > 10
    status, _, complaint = truth.snip("top", out, "--prompts", out / "p.txt")
    assert status == 1
    assert "never writes there" in complaint
    words = ("dedup", folder / "img_emb", "--out", tmp_path / "plain")
    assert truth.snip(*words)[0] == 0
    status, _, complaint = truth.snip("top", tmp_path / "plain", "--prompts", tmp_path / "q")
    assert status == 1
    assert "name it with --metadata" in complaint
    assert not (tmp_path / "q").exists()
    words = ("top", tmp_path / "plain", "--metadata", folder / "metadata", "-n", 3)
    assert truth.snip(*words, "--prompts", tmp_path / "q")[0] == 0
    assert len((tmp_path / "q").read_text().splitlines()) == 3


def test_rows_without_a_pair(tmp_path):
    truth.save_shards(tmp_path / "set", np.eye(5, dtype=np.float32), [])
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "o")[0] == 0
    assert truth.snip("top", tmp_path / "o")[1] == "no row stands for another one\n"
    assert found(tmp_path / "o") == []


def test_unverified_rows_have_no_cosine(case, tmp_path):
    assert truth.snip("index", case[1], "--out", tmp_path / "i")[0] == 0
    assert truth.snip("dedup", "--index", tmp_path / "i", "--out", tmp_path / "o")[0] == 0
    entries = found(tmp_path / "o", "-n", 3)
    assert len(entries) == 3
    assert {e["similarity_mean"] for e in entries} == {None}
    assert "  -  " in truth.snip("top", tmp_path / "o")[1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-n", "0"], 2, "-n must lie between"),
        (["-n", "x"], 2, "n must be a whole number"),
        (["--metadata", "nowhere"], 1, "nowhere"),
    ],
)
def test_refusals(case, words, status, message):
    found, said, complaint = truth.snip("top", case[0], *words)
    assert (found, said) == (status, "")
    assert message in complaint


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path):
    assert "expected a finished dedup folder" in truth.snip("top", tmp_path)[2]
