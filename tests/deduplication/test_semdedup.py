"""SemDeDup's rule against twenty plain lines of it, on the same centroids, row for row."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import dedup
from snipdedup.errors import UsageError
from snipdedup.groups.keep import keep_rank


def plain(x, centroids, keep):
    """What the paper's rule looks at: unit rows, clusters, the order in each, one triangle.

    A row goes if its highest cosine with an earlier row of its cluster is above 1 - epsilon.
    """
    unit = x.astype(np.float64)
    unit /= np.sqrt((unit * unit).sum(1, keepdims=True))
    near = unit @ centroids.T.astype(np.float64)
    cluster = near.argmax(1)
    nearest = np.einsum("ij,ij->i", unit, centroids[cluster].astype(np.float64))
    order = {
        "hard": nearest,
        "easy": -nearest,
        "random": keep_rank(np.arange(len(x)), "random", 0),
    }[keep]
    highest = np.zeros(len(x), np.float32)
    for number in range(len(centroids)):
        rows = np.flatnonzero(cluster == number)
        rows = rows[np.argsort(order[rows], kind="stable")]
        triangle = np.triu((unit[rows] @ unit[rows].T).astype(np.float32), 1)
        triangle[np.tril_indices(len(rows))] = -2
        highest[rows] = triangle.max(0, initial=-2)
    return highest


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(3000, 24, 3, clusters=400, noise=0.5, copies=0.2, dtype=np.float16)


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("clusters", [1, 9])
def test_the_rule_is_the_plain_one(rows, keep, clusters):
    found = dedup(rows, method="semdedup", clusters=clusters, keep=keep, borders=False)
    best = found.search.best
    assert len(best.centroids) == clusters
    assert np.allclose(np.linalg.norm(best.centroids, axis=1), 1, atol=1e-6)
    highest = plain(rows, best.centroids, keep)
    for epsilon in (0.02, 0.05, 0.2):
        expected = highest > np.float32(1 - epsilon)
        assert found.at(1 - epsilon).is_dup.tolist() == expected.tolist()
    assert 300 < found.removed < 2700


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_the_rule_is_the_plain_one_on_key_frames(data, tmp_path, snip, keep):
    parts = "0:2" if keep == "hard" else "0:1"
    pattern = data / "keyframes" / "img_emb" / "img_emb_{part:04d}.npy"
    said = snip(
        "dedup", pattern, "--parts", parts, "--out", tmp_path / "o", "--method", "semdedup",
        "--clusters", 5, "--keep", keep, "--epsilon", ".05,.03,.1",
    ).stdout  # fmt: skip
    files = sorted((data / "keyframes" / "img_emb").glob("*.npy"))[: int(parts[-1])]
    x = np.concatenate([np.load(path) for path in files])
    centroids = np.load(tmp_path / "o" / "centroids.npy")
    highest = plain(x, centroids, keep)
    gone = np.load(tmp_path / "o" / "is_dup.npy")
    assert np.array_equal(gone, highest > np.float32(0.95))
    for epsilon in (0.05, 0.03, 0.1):
        count = (highest > np.float32(1 - epsilon)).sum()
        assert f"{epsilon:g}   {count:>12,}" in said


def test_each_removed_row_names_its_match(rows, tmp_path):
    out = tmp_path / "o"
    folder = truth.save_shards(tmp_path / "f", rows, [1000])
    words = ("dedup", folder, "--out", out, "--method", "semdedup", "--clusters", 9)
    assert truth.snip(*words)[0] == 0
    table = truth.cosine_table(rows)
    table[(rows[:, None, :] == rows[None, :, :]).all(2)] = 1
    every = pq.read_table(out / "semdedup.parquet").to_pydict()
    groups = pq.read_table(out / "groups.parquet").to_pylist()
    removed = np.load(out / "is_dup.npy")
    assert {row["row"] for row in groups if row["is_dup"]} == set(np.flatnonzero(removed))
    chained = 0
    for row in groups:
        if row["is_dup"]:
            assert row["representative"] == every["match"][row["row"]]
            assert every["cluster"][row["row"]] == every["cluster"][row["representative"]]
            assert row["similarity"] == table[row["row"], row["representative"]] > 0.95
            chained += removed[row["representative"]]
        else:
            assert row["representative"] == row["row"]
    assert chained > 0  # the rule's own: a match may itself be removed
    forest = pq.read_table(out / "forest.parquet").to_pydict()
    label = truth.components(len(rows), zip(forest["a"], forest["b"], strict=True))
    assert all(row["group"] == label[row["row"]] for row in groups)
    assert len(forest["a"]) == removed.sum()


def test_what_borders_cost_is_counted_against_the_join(rows, tmp_path):
    folder, out = truth.save_shards(tmp_path / "f", rows, []), tmp_path / "o"
    words = ("dedup", folder, "--out", out, "--method", "semdedup", "--clusters", 9)
    status, said, _ = truth.snip(*words)
    assert status == 0
    first = {}
    for row, key in enumerate(map(bytes, rows)):
        first.setdefault(key, row)
    distinct, removed = set(first.values()), np.load(out / "is_dup.npy")
    pairs = [p for p in truth.pairs_of(truth.cosine_table(rows), 0.95) if distinct.issuperset(p)]
    cluster = pq.read_table(out / "semdedup.parquet")["cluster"].to_pylist()
    across = sum(cluster[a] != cluster[b] for a, b in pairs)
    beside = {b for a, b in pairs if not removed[a] and not removed[b]}
    assert f"{across:,} of {len(pairs):,} pairs" in said
    assert f"{len(beside):,} rows are kept beside a match" in said
    star = dedup(rows).is_dup
    assert f"star removes {star.sum():,} rows, {(star & removed).sum():,} of them are" in said
    assert len(beside) > 0


def test_another_epsilon_needs_no_search(rows, tmp_path):
    folder, out = truth.save_shards(tmp_path / "f", rows, []), tmp_path / "o"
    how = ("--method", "semdedup", "--clusters", 9, "--keep", "easy", "--noborders")
    assert truth.snip("dedup", folder, "--out", out, *how)[0] == 0
    for epsilon in (0.01, 0.2):  # below and above the one decided by
        again, fresh = tmp_path / f"a{epsilon}", tmp_path / f"f{epsilon}"
        assert truth.snip("dedup", out, "--epsilon", epsilon, "--out", again)[0] == 0
        assert truth.snip("dedup", folder, "--out", fresh, *how, "--epsilon", epsilon)[0] == 0
        for name in ("is_dup.npy", "groups.parquet", "forest.parquet", "semdedup.parquet"):
            assert (again / name).read_bytes() == (fresh / name).read_bytes()
        highest = plain(rows, np.load(again / "centroids.npy"), "easy")
        expected = highest > np.float32(1 - epsilon)
        assert np.array_equal(np.load(again / "is_dup.npy"), expected)
    status, _, line = truth.snip("dedup", out, "--keep", "random", "--out", tmp_path / "r")
    assert (status, "--keep random belongs to the search" in line) == (2, True)


def test_threads_chunks_and_shards_change_nothing(rows, tmp_path):
    how = {"method": "semdedup", "clusters": 9, "borders": False, "seed": 3, "keep": "random"}
    whole = dedup(rows, threads=1, **how)
    cut = truth.save_shards(tmp_path / "f", rows, list(range(100, 3000, 700)))
    for more in ({"threads": 2}, {"threads": 2, "chunk_rows": 100}):
        again = dedup(cut, **how, **more)
        assert np.array_equal(again.search.best.centroids, whole.search.best.centroids)
        assert np.array_equal(again.search.best.match, whole.search.best.match)
        assert np.array_equal(again.is_dup, whole.is_dup)


def test_bad_rows_and_tiny_sets():
    x = np.eye(6, 4, dtype=np.float32)  # two rows of zeros
    found = dedup(x, method="semdedup", bad_rows="keep")
    assert found.removed == 0
    assert found.search.best.cluster.tolist() == [0, 0, 0, 0, -1, -1]
    found = dedup(np.ones((3, 4)), method="semdedup", clusters=50, epsilon=0)
    assert found.removed == 0  # the rule: above 1 - 0, so copies stay
    assert dedup(np.ones((3, 4)), method="semdedup").is_dup.tolist() == [False, True, True]
    assert dedup(np.ones((1, 4)), method="semdedup").removed == 0


@pytest.mark.parametrize(
    "how",
    [
        {"method": "semdedup", "grouping": "star"},
        {"method": "semdedup", "keep": "first"},
        {"method": "semdedup", "keep_fraction": 0.5},
        {"method": "semdedup", "epsilon": "a,b"},
        {"method": "semdedup", "epsilon": 3},
        {"method": "semdedup", "text_features": np.eye(3)},
        {"method": "join", "epsilon": 0.05},
        {"method": "exact", "clusters": 5},
        {"keep": "hard"},
    ],
)
def test_what_does_not_go_with_the_rule_is_wrong_usage(how):
    with pytest.raises(UsageError):
        dedup(np.eye(3), **how)


@pytest.mark.parametrize("flag", [{"epsilon": 0.1}, {"clusters": 5}])
@pytest.mark.parametrize("method", [None, "join", "exact"])
def test_its_flags_are_refused_with_other_methods(flag, method):
    with pytest.raises(UsageError, match="goes with --method semdedup"):
        dedup(np.eye(20, dtype=np.float32), method=method, **flag)
