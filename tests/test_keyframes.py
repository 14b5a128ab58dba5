"""Real features, judged by code of its own: the raw files, numpy, and nothing of the package.

The truth is brute force: float32 tiles propose, float64 decides. It is computed once a session.
"""

from __future__ import annotations

import csv
import json
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

THRESHOLD = 0.95
TILE = 4096


class Truth(NamedTuple):
    """Rows as stored, all pairs (a < b) among them, and what star and components remove."""

    rows: np.ndarray
    unit: np.ndarray
    a: np.ndarray
    b: np.ndarray
    star: np.ndarray
    beyond: int


def load(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def unit_rows(rows):
    wide = rows.astype(np.float64)
    return wide / np.sqrt((wide * wide).sum(1, keepdims=True))


def brute_force(unit, threshold):
    """All pairs a < b whose float64 cosine, as float32, reaches the threshold."""
    short = unit.astype(np.float32)
    found = [(np.empty(0, int), np.empty(0, int))]
    for i in range(0, len(short), TILE):
        for j in range(i, len(short), TILE):
            close = short[i : i + TILE] @ short[j : j + TILE].T >= threshold - 1e-5
            a, b = np.nonzero(np.triu(close, 1) if i == j else close)
            a, b = a + i, b + j
            cosine = np.einsum("ij,ij->i", unit[a], unit[b]).astype(np.float32)
            true = cosine >= np.float32(threshold)
            found.append((a[true], b[true]))
    return tuple(np.concatenate(side) for side in zip(*found, strict=True))


def star_first(rows, a, b):
    """In row order a row stays unless a staying one before it is its pair."""
    order = np.argsort(b, kind="stable")
    earlier, starts = a[order], np.searchsorted(b[order], np.arange(rows + 1))
    stays = np.ones(rows, bool)
    for row in range(rows):
        stays[row] = not stays[earlier[starts[row] : starts[row + 1]]].any()
    return ~stays


def beyond_one_a_component(rows, a, b):
    """Rows beyond one a component, by label propagation to the smallest."""
    label = np.arange(rows)
    while True:
        before = label.copy()
        np.minimum.at(label, b, label[a])
        np.minimum.at(label, a, label[b])
        label = label[label]
        if np.array_equal(label, before):
            return rows - len(np.unique(label))


def judge(rows):
    unit = unit_rows(rows)
    a, b = brute_force(unit, THRESHOLD)
    star = star_first(len(rows), a, b)
    return Truth(rows, unit, a, b, star, beyond_one_a_component(len(rows), a, b))


@pytest.fixture(scope="session")
def truth(data):
    return judge(load(data / "keyframes" / "img_emb"))


PART_FILES, PART_ROWS = "0:4", 20_306


@pytest.fixture(scope="session")
def part(truth):
    """The truth of the first four files: the star rule goes by row order, so it can be cut."""
    inside = (truth.a < PART_ROWS) & (truth.b < PART_ROWS)
    return truth.a[inside], truth.b[inside]


@pytest.fixture(scope="session")
def exact_part(data, snip, tmp_path_factory):
    """OUT of brute force over the first four files."""
    out = tmp_path_factory.mktemp("part") / "OUT"
    pattern = data / "keyframes" / "img_emb" / "img_emb_{part:04d}.npy"
    snip("dedup", pattern, "--parts", PART_FILES, "--out", out, "--method", "exact")
    return out


@pytest.fixture(scope="session")
def outs(data, snip, tmp_path_factory):
    """OUT by method and grouping, each run once."""
    folder, done = tmp_path_factory.mktemp("keyframes"), {}

    def run(method, grouping):
        name = f"{method} {grouping}"
        if name not in done:
            done[name] = folder / name.replace(" ", "_")
            source = data / "keyframes" / "img_emb"
            if (method, grouping) == ("exact", "components"):  # from the forest, no second search
                source = run("exact", "star")
            snip(
                "dedup", source, "--metadata", data / "keyframes" / "metadata",
                "--out", done[name], "--method", method, "--grouping", grouping,
            )  # fmt: skip
        return done[name]

    return run


def mask(out):
    return np.load(out / "is_dup.npy")


def counts(out):
    return json.loads((out / "snip.json").read_text())["counts"]


def test_the_truth_is_that_of_the_data(truth):
    assert truth.rows.shape == (58_977, 512)
    assert abs(truth.star.sum() - 13_066) <= 2
    assert abs(truth.beyond - 15_644) <= 2


def test_exact_is_the_truth_of_four_files(part, exact_part, snip, tmp_path):
    assert np.array_equal(mask(exact_part), star_first(PART_ROWS, *part))
    snip("dedup", exact_part, "--grouping", "components", "--out", tmp_path / "o")
    assert mask(tmp_path / "o").sum() == beyond_one_a_component(PART_ROWS, *part)


@pytest.mark.slow
def test_exact_is_the_truth(truth, outs):
    assert np.array_equal(mask(outs("exact", "star")), truth.star)
    assert mask(outs("exact", "components")).sum() == truth.beyond


@pytest.mark.parametrize("method", ["join", pytest.param("exact", marks=pytest.mark.slow)])
def test_every_removed_row_has_a_staying_row_that_matches(truth, outs, method):
    groups = pq.read_table(outs(method, "star") / "groups.parquet")
    row, stays_for, similarity, is_dup, group = (
        groups[name].to_numpy()
        for name in ("row", "representative", "similarity", "is_dup", "group")
    )
    removed = mask(outs(method, "star"))
    assert np.array_equal(np.flatnonzero(removed), np.sort(row[is_dup]))
    assert not removed[stays_for].any()
    cosine = np.einsum("ij,ij->i", truth.unit[row], truth.unit[stays_for])
    assert (cosine >= THRESHOLD - 1e-6).all()
    assert np.allclose(cosine, similarity, rtol=0, atol=1e-6)
    group_of = np.full(len(removed), -1)
    group_of[row] = group
    assert np.array_equal(group_of[stays_for], group)


def test_join_removes_what_brute_force_removes(truth, outs):
    removed = mask(outs("join", "star"))
    assert (removed & truth.star).sum() >= 0.995 * truth.star.sum()
    assert removed.sum() <= 1.005 * truth.star.sum()
    staying = ~removed
    beside = staying[truth.a] & staying[truth.b]
    assert beside.sum() <= 0.001 * len(truth.a)


def test_join_finds_the_components(truth, outs):
    out = outs("join", "components")
    assert mask(out).sum() >= 0.995 * truth.beyond
    assert mask(out).sum() <= truth.beyond
    forest = pq.read_table(out / "forest.parquet")
    a, b = forest["a"].to_numpy(), forest["b"].to_numpy()
    cosine = np.einsum("ij,ij->i", truth.unit[a], truth.unit[b])
    assert (cosine >= THRESHOLD - 1e-6).all()
    assert len(a) == mask(out).sum()
    chained = counts(out)["chained"]
    groups = pq.read_table(out / "groups.parquet")
    row, stays_for = groups["row"].to_numpy(), groups["representative"].to_numpy()
    cosine = np.einsum("ij,ij->i", truth.unit[row], truth.unit[stays_for])
    assert chained == (cosine.astype(np.float32) < np.float32(THRESHOLD)).sum() > 1000


def test_top_is_that_of_the_exact_pairs(truth, outs, snip):
    stays = ~truth.star
    row, of = (np.concatenate(ends) for ends in ((truth.a, truth.b), (truth.b, truth.a)))
    here = truth.star[row] & stays[of]
    row, of = row[here], of[here]
    cosine = np.einsum("ij,ij->i", truth.unit[row], truth.unit[of]).astype(np.float32)
    order = np.lexsort((of, -cosine, row))
    nearest = order[np.unique(row[order], return_index=True)[1]]
    dup_count = np.bincount(of[nearest], minlength=len(stays))
    first = np.lexsort((np.arange(len(stays)), -dup_count))[:10]
    found = json.loads(snip("top", outs("join", "star"), "-n", 10, "--json").stdout)
    assert [(entry["row"], entry["dup_count"]) for entry in found] == [
        (row, dup_count[row]) for row in first.tolist()
    ]
    for entry in found:
        members = cosine[nearest][of[nearest] == entry["row"]]
        assert entry["similarity_lowest"] == pytest.approx(members.min(), abs=1e-6)
        assert entry["similarity_mean"] == pytest.approx(members.mean(dtype=float), abs=1e-6)
        assert entry["similarity_lowest"] >= THRESHOLD


def test_audit_passes(data, outs, snip):
    said = snip("audit", outs("join", "star"), data / "keyframes").stdout
    removed = counts(outs("join", "star"))["removed"]
    assert f"{removed:,} of {removed:,} removed rows reach 0.95" in said
    assert "compared with the input" in said


@pytest.mark.parametrize(("method", "grouping"), [("join", "star"), ("join", "components")])
def test_the_cleaned_metadata_are_the_staying_rows_in_order(data, outs, method, grouping):
    out, removed = outs(method, grouping), mask(outs(method, grouping))
    groups = pq.read_table(out / "groups.parquet").filter(
        pq.read_table(out / "groups.parquet")["is_dup"]
    )
    represents = np.bincount(groups["representative"].to_numpy(), minlength=len(removed))
    sources = sorted((data / "keyframes" / "metadata").glob("*.parquet"))
    assert len(sources) == 12
    assert sorted(p.name for p in (out / "metadata").iterdir()) == [p.name for p in sources]
    begin = 0
    for source in sources:
        before, after = pq.read_table(source), pq.read_table(out / "metadata" / source.name)
        kept = ~removed[begin : begin + before.num_rows]
        rows = np.flatnonzero(kept)
        for name in ("key", "video", "frame"):
            values = before[name].to_pylist()
            assert after[name].to_pylist() == [values[row] for row in rows]
            assert after.schema.field(name) == before.schema.field(name)
        assert after["dup_count"].to_pylist() == represents[begin + rows].tolist()
        begin += before.num_rows
    assert begin == len(removed)
    assert represents.sum() == removed.sum()


def test_keys_are_those_of_the_metadata(data, outs):
    sources = sorted((data / "keyframes" / "metadata").glob("*.parquet"))
    keys = [key for source in sources for key in pq.read_table(source)["key"].to_pylist()]
    groups = pq.read_table(outs("join", "star") / "groups.parquet")
    assert groups["key"].to_pylist() == [keys[row] for row in groups["row"].to_pylist()]


def test_one_file_of_all_rows_gives_the_same_mask(data, truth, outs, snip, tmp_path):
    """Twelve shards or one, other chunks, one thread, a second run."""
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "all.npy", truth.rows)
    words = ("--threads", 1, "--chunk_rows", 1000)
    snip("dedup", tmp_path / "one", "--out", tmp_path / "o", *words)
    assert np.array_equal(mask(tmp_path / "o"), mask(outs("join", "star")))


def test_at_another_threshold_without_a_search(truth, part, exact_part, snip, tmp_path):
    snip("dedup", exact_part, "--threshold", 0.98, "--out", tmp_path / "o")
    a, b = part
    high = np.einsum("ij,ij->i", truth.unit[a], truth.unit[b]).astype(np.float32)
    high = high >= np.float32(0.98)
    assert np.array_equal(mask(tmp_path / "o"), star_first(PART_ROWS, a[high], b[high]))


# the small sets


def run(snip, tmp_path, *words):
    snip("dedup", *words, "--out", tmp_path / "o")
    return mask(tmp_path / "o")


def test_chia_loses_400_rows_and_no_caption_of_those_that_stay(data, snip, tmp_path):
    folder = data / "small" / "chia500"
    words = (folder / "image_embeddings.npy", "--metadata", folder / "metadata.csv")
    removed = run(snip, tmp_path, *words)
    assert removed.sum() == 400
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    (path,) = (tmp_path / "o" / "metadata").iterdir()
    kept = pq.read_table(path)
    assert kept["caption"].to_pylist() == [captions[row] for row in np.flatnonzero(~removed)]
    assert sum(kept["dup_count"].to_pylist()) == 400


def test_a_folder_of_image_and_text_features_is_refused_with_a_hint(data, snip, tmp_path):
    done = snip("dedup", data / "small" / "chia500", "--out", tmp_path / "o", status=1)
    assert "mixes image and text features" in done.stderr
    assert "image_embeddings" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["wukong", "design_patents", "shopsphere", "stbi"])
def test_a_small_set_loses_what_brute_force_loses(data, snip, tmp_path, name):
    path = data / "small" / name / "image_embeddings.npy"
    expected = judge(np.load(path))
    assert np.array_equal(run(snip, tmp_path, path), expected.star)
    if name == "wukong":
        assert expected.beyond == 250
    if name == "design_patents":
        assert np.load(path).dtype == np.float64


def test_a_clip_retrieval_folder_with_a_stray_index_file(data, snip, tmp_path):
    folder = data / "small" / "clip_retrieval_out"
    removed = run(snip, tmp_path, folder)
    rows = load(folder / "img_emb")
    assert np.array_equal(removed, judge(rows).star)
    assert len(removed) == 9
    before = pq.read_table(folder / "metadata" / "metadata_0.parquet")
    after = pq.read_table(tmp_path / "o" / "metadata" / "metadata_0.parquet")
    assert after["caption"].to_pylist() == [
        before["caption"][int(r)].as_py() for r in np.flatnonzero(~removed)
    ]
