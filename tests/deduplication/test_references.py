"""Reference rows come first and never go: against a plain star and plain components."""

from __future__ import annotations

import json
import os
import shutil
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import dedup
from snipdedup.deduplication.inputs import open_reference_rows
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.formats import ArrayShard
from snipdedup.features.shards import Features
from snipdedup.groups import pairs
from snipdedup.groups.pairs import own_copies, own_pairs
from snipdedup.join import tiles
from snipdedup.join.forest import make_edges
from snipdedup.storage import out_folder


def table_of(x):
    """All cosines; rows equal bit for bit have exactly 1."""
    table = truth.cosine_table(x)
    table[(x[:, None, :] == x[None, :, :]).all(2)] = 1
    return table


def plain_components(table, frozen, threshold, order):
    """Who stays: one row a component of the rows from ``frozen`` on, none where one matches."""
    own = table[frozen:, frozen:]
    label = truth.components(len(own), truth.pairs_of(own, threshold))
    matched = (table[frozen:, :frozen] >= np.float32(threshold)).any(1)
    taken, stays = set(label[matched]), np.zeros(len(own), bool)
    for row in order:
        if label[row - frozen] not in taken:
            taken.add(label[row - frozen])
            stays[row - frozen] = True
    return stays


@st.composite
def two_sets(draw):
    """Reference rows and others, crowded, some equal bit for bit across and within."""
    x = truth.clustered(
        draw(st.integers(2, 45)),
        draw(st.integers(3, 8)),
        draw(st.integers(0, 2**31)),
        clusters=draw(st.integers(1, 8)),
        noise=draw(st.sampled_from([0.1, 0.4, 1.0])),
        copies=draw(st.sampled_from([0, 0.4])),
        dtype=draw(st.sampled_from([np.float16, np.float32])),
    )
    return x, draw(st.integers(1, len(x) - 1))


@pytest.mark.parametrize("method", ["exact", "join"])
@settings(max_examples=40)
@given(both=two_sets(), keep=st.sampled_from(["first", "last"]), late=st.sampled_from([0.8, 0.95]))
def test_star_with_references_is_the_plain_rule(method, both, keep, late):
    x, frozen = both
    found = dedup(x[frozen:], reference=x[:frozen], threshold=0.8, method=method, keep=keep)
    found, table = found.at(late), table_of(x)
    order = np.arange(frozen, len(x))[:: 1 if keep == "first" else -1]
    representative, stays = truth.star(table, late, order, frozen)
    assert found.is_dup.tolist() == (~stays[frozen:]).tolist()
    groups = found.groups.to_pydict()
    for row, named, of, similarity, near in zip(
        groups["row"], groups["representative"], groups["reference"], groups["similarity"],
        groups["reference_similarity"], strict=True,
    ):  # fmt: skip
        assert named + (0 if of else frozen) == representative[row + frozen]
        assert of in (None, "reference 0")
        assert similarity == table[row + frozen, representative[row + frozen]]
        best = table[row + frozen, :frozen].max()
        assert near == (best if best >= np.float32(late) else None)
    own = table[frozen:, frozen:]
    edges = found.forest.filter(
        np.array(found.forest["similarity"].to_numpy() >= np.float32(late))
    ).to_pydict()
    pairs = [(a, b, own[a, b]) for a, b in truth.pairs_of(own, late)]
    expected = truth.kruskal(pairs)
    label = truth.components(len(own), [pair[:2] for pair in expected])
    linked = zip(edges["a"], edges["b"], strict=True)
    assert label.tolist() == truth.components(len(own), linked).tolist()
    assert sorted(edges["similarity"]) == sorted(float(pair[2]) for pair in expected)


@settings(max_examples=40)
@given(both=two_sets(), late=st.sampled_from([0.8, 0.95]))
def test_components_go_whole_where_a_reference_row_is_chained(both, late):
    x, frozen = both
    found = dedup(x[frozen:], reference=x[:frozen], threshold=0.8, method="exact")
    found, table = found.at(late, "components"), table_of(x)
    stays = plain_components(table, frozen, late, range(frozen, len(x)))
    assert found.is_dup.tolist() == (~stays).tolist()
    for row in found.groups.to_pylist():
        named = row["representative"] + (0 if row["reference"] else frozen)
        assert row["similarity"] == table[row["row"] + frozen, named]
        if row["reference_similarity"] is not None:
            assert row["similarity"] == row["reference_similarity"]


def test_large_groups_and_many_reference_rows_are_tiled():
    x = truth.clustered(1800, 16, 5, clusters=2, noise=0.8, copies=0.1)
    found = dedup(x[1200:], reference=x[:1200], threshold=0.9)
    table = table_of(x)
    representative, stays = truth.star(table, 0.9, range(1200, 1800), 1200)
    assert found.is_dup.tolist() == (~stays[1200:]).tolist()
    assert 10 < stays[1200:].sum() < 590
    named = found.members.representative
    expected = representative[found.members.row + 1200]
    assert np.where(named < 0, ~named, named + 1200).tolist() == expected.tolist()


@pytest.mark.parametrize("method", ["exact", "join"])
@settings(max_examples=40)
@given(
    both=two_sets(),
    late=st.sampled_from([0.8, 0.95]),
    grouping=st.sampled_from(["star", "components"]),
    tile=st.sampled_from([1, 7, 1024]),
)
def test_with_references_only_exactly_the_rows_that_match_one_go(
    method, both, late, grouping, tile
):
    """Each for its nearest reference row, copies of one another too; no others are grouped."""
    x, frozen = both
    with mock.patch.multiple(pairs, LISTED_GROUP=tile, TILE=tile):
        found = dedup(
            x[frozen:], reference=x[:frozen], threshold=0.8, method=method, references_only=True,
            grouping=grouping,
        ).at(late)  # fmt: skip
    across = table_of(x)[frozen:, :frozen]
    best, rows = across.max(1), np.flatnonzero(across.max(1) >= np.float32(late))
    assert np.flatnonzero(found.is_dup).tolist() == rows.tolist()
    groups = found.groups.to_pydict()
    assert groups["row"] == groups["group"] == rows.tolist()
    assert groups["representative"] == across.argmax(1)[rows].tolist()
    assert groups["similarity"] == groups["reference_similarity"] == best[rows].tolist()
    assert set(groups["reference"]) <= {"reference 0"}
    assert found.forest.num_rows == 0


@pytest.mark.parametrize("crowded", [0.0, 1 / 64])
def test_the_forest_of_a_crowd_with_reference_rows_is_that_of_the_others(crowded):
    """Whether its tiles are listed or give forests, and whoever the reference rows are."""
    x = truth.clustered(700, 12, 9, clusters=2, noise=0.8, copies=0.05)
    small = {"CROWDED": crowded, "ROW_TILE": 64, "COLUMN_TILE": 128}
    with mock.patch.multiple(tiles, **small):
        found = dedup(x[300:], reference=x[:300], threshold=0.9)
    table = table_of(x)
    _, stays = truth.star(table, 0.9, range(300, 700), 300)
    assert found.is_dup.tolist() == (~stays[300:]).tolist()
    own = table[300:, 300:]
    expected = truth.kruskal([(a, b, own[a, b]) for a, b in truth.pairs_of(own, 0.9)])
    edges = found.forest.to_pydict()
    linked = list(zip(edges["a"], edges["b"], strict=True))
    label = truth.components(400, linked)
    assert label.tolist() == truth.components(400, [pair[:2] for pair in expected]).tolist()
    assert len(linked) == len(expected)
    worth = np.array([pair[2] for pair in expected])
    # a crowded tile may take one of two pairs that are nearly as near
    assert np.abs(np.sort(edges["similarity"]) - np.sort(worth)).max() < 1e-4


class Counted(Features):
    """Features that count the rows that are gathered."""

    gathered = 0

    def gather_ascending(self, rows, out=None):
        """See `Features.gather_ascending`."""
        self.gathered += len(rows)
        return super().gather_ascending(rows, out)


@pytest.mark.parametrize("references", [1, 40])
def test_a_crowd_is_compared_with_its_reference_rows_only(references):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(16) + 0.05 * rng.standard_normal((6000, 16))).astype(np.float32)
    features = Counted([ArrayShard(x, "x")])
    chain = np.arange(1, 6000)
    forest = make_edges(chain - 1, chain, np.ones(5999))
    none = np.empty(0, np.int64)
    found, _, _, nearest = own_pairs(features, references, forest, (none, none), 0.9, 2)
    assert features.gathered <= 1.5 * 6000  # a table of all pairs gathers each row six times
    across = truth.cosine_table(x)[references:, :references]
    assert np.array_equal(nearest.row, np.arange(6000 - references))
    assert np.array_equal(nearest.reference, across.argmax(1))
    assert np.array_equal(nearest.similarity, across.max(1))
    assert np.array_equal(found.a, np.arange(5999 - references))


def test_copies_are_told_apart_by_the_side_they_lie_on():
    copies, firsts = np.array([1, 4, 5, 6, 8]), np.array([0, 0, 0, 2, 7])
    copy, first, twins = own_copies(copies, firsts, 3)
    assert (copy.tolist(), first.tolist()) == ([5, 8], [4, 7])
    assert list(zip(*(side.tolist() for side in twins), strict=True)) == [(0, 4), (2, 6)]


# the three uses, by the command line


@pytest.fixture
def sets(tmp_path):
    """Rows of one source in three folders, so that each has matches in the others."""
    x = truth.clustered(900, 12, 7, clusters=150, noise=0.5, copies=0.1)
    parts = np.split(x, [500, 700])
    folders = [truth.save_shards(tmp_path / f"set{i}", part, [len(part) // 3])
               for i, part in enumerate(parts)]  # fmt: skip
    return x, folders


def groups_of(out):
    return pq.read_table(out / "groups.parquet").to_pylist()


def test_adding_shards_leaves_no_pair_and_changes_nothing(sets, tmp_path):
    x, folders = sets
    outs = [tmp_path / f"out{i}" for i in range(3)]
    how = ("--method", "exact", "--threshold", 0.9)
    assert truth.snip("dedup", folders[0], "--out", outs[0], *how)[0] == 0
    before = truth.listing(outs[0])
    assert truth.snip("dedup", folders[1], "--out", outs[1], "--reference", outs[0], *how)[0] == 0
    status, said, _ = truth.snip(
        "dedup", folders[2], "--out", outs[2], "--reference", outs[1], *how
    )
    assert status == 0
    assert "removed for one of" in said
    assert truth.listing(outs[0]) == before
    removed = np.concatenate([np.load(out / "is_dup.npy") for out in outs])
    table = table_of(x)
    assert not truth.pairs_of(table[~removed][:, ~removed], 0.9)
    _, stays = truth.star(table, 0.9, range(len(x)), 0)
    assert removed.tolist() == (~stays).tolist()  # as all at once, in this order
    first = {str(outs[0].absolute()): 0, str(outs[1]): 500, None: 700}
    for row in groups_of(outs[2]):
        named = row["representative"] + first[row["reference"]]
        assert not removed[named] or named == row["row"] + 700
        assert row["similarity"] == table[row["row"] + 700, named]
    manifest = json.loads((outs[2] / "snip.json").read_text())
    assert [held["kind"] for held in manifest["references"]] == ["dedup", "dedup"]
    assert [held["first"] for held in manifest["references"]] == [0, (~removed[:500]).sum()]
    assert manifest["counts"]["reference_rows"] == (~removed[:700]).sum()
    for held, folder in zip(manifest["references"], folders[:2], strict=True):
        checksums = [shard["checksum"] for shard in held["shards"]]
        own = tmp_path / "own" / folder.name
        assert truth.snip("dedup", folder, "--out", own)[0] == 0
        known = json.loads((own / "snip.json").read_text())["shards"]
        assert checksums == [shard["checksum"] for shard in known]


def test_decontamination_removes_what_is_in_a_test_set(sets, tmp_path):
    """Test sets are references as they are: their own duplicates stay."""
    x, folders = sets
    both = f"{folders[1]},{folders[2]}"
    words = ("dedup", folders[0], "--out", tmp_path / "o", "--reference", both)
    assert truth.snip(*words, "--threshold", 0.9)[0] == 0
    table = table_of(np.concatenate([x[500:], x[:500]]))
    _, stays = truth.star(table, 0.9, range(400, 900), 400)
    assert np.load(tmp_path / "o" / "is_dup.npy").tolist() == (~stays[400:]).tolist()
    names = {row["reference"] for row in groups_of(tmp_path / "o")}
    assert names == {None, str(folders[1]), str(folders[2])}
    assert "finished already" in truth.snip(*words, "--threshold", 0.9)[1]
    again = ("dedup", tmp_path / "o", "--threshold", 0.95, "--out", tmp_path / "o2")
    assert truth.snip(*again)[0] == 0
    _, stays = truth.star(table, 0.95, range(400, 900), 400)
    assert np.load(tmp_path / "o2" / "is_dup.npy").tolist() == (~stays[400:]).tolist()
    fresh = ("dedup", folders[0], "--out", tmp_path / "o3", "--reference", both)
    assert truth.snip(*fresh, "--threshold", 0.95)[0] == 0
    for name in ("groups.parquet", "references.parquet"):
        one, other = (pq.read_table(tmp_path / out / name).to_pylist() for out in ("o2", "o3"))
        for row in one:  # a re-threshold knows references by their whole paths
            row["reference"] = row["reference"] and row["reference"].replace(f"{tmp_path}/", "")
        for row in other:
            row["reference"] = row["reference"] and row["reference"].replace(f"{tmp_path}/", "")
        assert one == other


def test_generated_images_that_copy_training_images_are_named(tmp_path):
    """The training set is the reference: each copying row names the row it copies."""
    train = truth.clustered(400, 16, 1, clusters=400, noise=0.3)
    rng = np.random.default_rng(2)
    copied = rng.choice(400, 30, replace=False)
    made = rng.standard_normal((100, 16)).astype(np.float32)
    made[:30] = train[copied] + 0.01 * rng.standard_normal((30, 16))
    found = dedup(made, reference=train, method="exact")
    rows = {row["row"]: row for row in found.groups.to_pylist() if row["reference"]}
    assert sorted(rows) == list(range(30))
    assert [rows[row]["representative"] for row in range(30)] == copied.tolist()
    assert found.removed == 30


def test_metadata_counts_only_rows_of_its_own(sets, tmp_path):
    from samples import write_laion

    x, folders = sets
    laion = write_laion(tmp_path / "laion", x[500:], cuts=(100,))
    out = tmp_path / "o"
    words = ("dedup", laion, "--out", out, "--reference", folders[0], "--threshold", 0.9)
    assert truth.snip(*words)[0] == 0
    groups = groups_of(out)
    own = sum(row["is_dup"] and row["reference"] is None for row in groups)
    tables = [pq.read_table(path) for path in sorted((out / "metadata").glob("*.parquet"))]
    assert sum(sum(table["dup_count"].to_pylist()) for table in tables) == own > 10
    removed = np.load(out / "is_dup.npy")
    assert sum(table.num_rows for table in tables) == (~removed).sum()
    assert sum(row["is_dup"] and row["reference"] is not None for row in groups) > 10


# what is refused


def refused(*words, status=1):
    code, said, line = truth.snip(*words)
    assert (code, said) == (status, ""), (code, said, line)
    return line


@pytest.fixture
def earlier(sets, tmp_path):
    _, folders = sets
    out = tmp_path / "out"
    assert truth.snip("dedup", folders[0], "--out", out, "--reference", folders[1])[0] == 0
    return folders, out, ("dedup", folders[2], "--reference", out, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("which", "what", "said"),
    [
        (0, "changed", "img_emb_0.npy differs"),
        (0, "gone", "cannot be read now"),
        (1, "changed", "img_emb_0.npy differs"),
        (1, "gone", "cannot be read now"),
        (0, "mask", "is not what the run wrote"),
    ],
)
def test_an_earlier_run_whose_rows_are_not_there_any_more_is_refused(
    earlier, tmp_path, which, what, said
):
    folders, out, words = earlier
    path = folders[which] / "img_emb_0.npy"
    if what == "changed":
        np.save(path, np.load(path)[::-1])
    elif what == "gone":
        shutil.rmtree(folders[which])
    else:
        np.save(out / "is_dup.npy", ~np.load(out / "is_dup.npy"))
    line = refused(*words)
    assert said in line
    assert str(out) in line
    assert not (tmp_path / "o").exists()


def test_a_new_date_on_the_same_reference_is_no_change(earlier):
    folders, _, words = earlier
    for folder in folders[:2]:
        os.utime(folder / "img_emb_0.npy", (1, 1))
    assert truth.snip(*words)[0] == 0


def test_a_stopped_run_is_no_reference(sets, tmp_path):
    _, folders = sets
    with mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt):
        assert truth.snip("dedup", folders[0], "--out", tmp_path / "out")[0] == 130
    line = refused("dedup", folders[1], "--reference", tmp_path / "out", "--out", tmp_path / "o")
    assert "stopped" in line


def test_the_work_is_left_where_it_is_asked_for(sets, tmp_path):
    _, folders = sets
    out = tmp_path / "out"
    words = ("dedup", folders[0], "--out", out, "--keep_work")
    assert truth.snip(*words)[0] == 0
    assert (out / "work" / "model.npz").is_file()
    before = truth.listing(out)
    assert "finished already" in truth.snip(*words)[1]
    words = ("dedup", folders[1], "--reference", out, "--out")
    with mock.patch("snipdedup.join.tasks.fit_model", side_effect=AssertionError):
        status, said, _ = truth.snip(*words, tmp_path / "o")
    assert status == 0
    assert "by the model that its run kept" in said
    assert truth.listing(out) == before
    assert "by a new model" in truth.snip(*words, tmp_path / "p", "--threshold", 0.9)[1]
    shutil.rmtree(out / "work")
    assert "by a new model" in truth.snip(*words, tmp_path / "q")[1]
    for name in ("is_dup.npy", "groups.parquet"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "share"), [("exact", 0.0), ("join", 0.001)])
def test_key_frames_added_later_leave_next_to_nothing(data, tmp_path, snip, method, share):
    """The first 8 shards cleaned, the last 4 added; judged by brute force over what stays."""
    outs = tmp_path / "first", tmp_path / "second"
    words = (data / "keyframes" / "img_emb" / "img_emb_{part:04d}.npy", "--method", method)
    snip("dedup", *words, "--parts", "0:8", "--out", outs[0])
    before = truth.listing(outs[0])
    snip("dedup", *words, "--parts", "8:12", "--out", outs[1], "--reference", outs[0])
    assert truth.listing(outs[0]) == before
    removed = np.concatenate([np.load(out / "is_dup.npy") for out in outs])
    files = sorted((data / "keyframes" / "img_emb").glob("*.npy"))
    x = np.concatenate([np.load(path) for path in files])[~removed].astype(np.float64)
    x /= np.sqrt((x * x).sum(1, keepdims=True))
    short, beside = x.astype(np.float32), np.zeros(len(x), bool)
    for start in range(0, len(x), 4096):
        a, b = np.nonzero(short[start : start + 4096] @ short.T >= 0.95 - 1e-5)
        a, b = a[a + start < b] + start, b[a + start < b]
        true = np.einsum("ij,ij->i", x[a], x[b]).astype(np.float32) >= np.float32(0.95)
        beside[a[true]] = beside[b[true]] = True
    assert beside.sum() <= share * len(x)
    assert removed.sum() > 10_000


@pytest.fixture
def cleaned(sets, tmp_path, monkeypatch):
    """A folder of shards, named by a relative path, and the OUT made of it; others beside them."""
    _, folders = sets
    monkeypatch.chdir(tmp_path)
    assert truth.snip("dedup", "set0", "--out", "out")[0] == 0
    assert truth.snip("dedup", "set1", "--reference", "out", "--out", "later")[0] == 0
    for name in ("file", "hard", "copy"):
        (tmp_path / name).mkdir()
    shard = folders[0] / "img_emb_1.npy"
    (tmp_path / "link").symlink_to("set0")
    (tmp_path / "file" / "x_3.npy").symlink_to(shard)
    (tmp_path / "hard" / "x_3.npy").hardlink_to(shard)
    shutil.copy(shard, tmp_path / "copy" / "x_3.npy")
    return tmp_path


@pytest.mark.parametrize(
    ("features", "reference", "shard", "other"),
    [
        ("set0", "set0", "set0/img_emb_0.npy", "set0/img_emb_0.npy"),
        ("set0", "out", "set0/img_emb_0.npy", "set0/img_emb_0.npy"),
        ("set0", "{here}/set0", "set0/img_emb_0.npy", "{here}/set0/img_emb_0.npy"),
        ("set0", "set1,./link", "set0/img_emb_0.npy", "link/img_emb_0.npy"),
        ("link", "out", "link/img_emb_0.npy", "set0/img_emb_0.npy"),
        ("set0", "file", "set0/img_emb_1.npy", "file/x_3.npy"),
        ("file", "out", "file/x_3.npy", "set0/img_emb_1.npy"),
        ("hard", "out", "hard/x_3.npy", "set0/img_emb_1.npy"),
        ("copy", "out", "copy/x_3.npy", "set0/img_emb_1.npy"),
        ("set0/img_emb_1.npy", "out", "set0/img_emb_1.npy", "set0/img_emb_1.npy"),
        ("set0/img_emb_1.npy", "later", "set0/img_emb_1.npy", "set0/img_emb_1.npy"),
        ("copy", "later", "copy/x_3.npy", "set0/img_emb_1.npy"),
    ],
)
def test_a_reference_that_holds_a_shard_of_the_features_is_refused(
    cleaned, features, reference, shard, other
):
    reference, other = (text.format(here=cleaned) for text in (reference, other))
    line = refused("dedup", features, "--reference", reference, "--out", "o")
    assert f"{shard} of FEATURES" in line
    assert f"{other} of --reference" in line
    assert "all its rows would be removed" in line
    assert not (cleaned / "o").exists()


def test_other_parts_of_a_set_and_the_same_command_again_are_not_refused(cleaned):
    words = ("dedup", "set0/img_emb_{part}.npy", "--parts")
    assert truth.snip(*words, "0:1", "--out", "first")[0] == 0
    words = (*words, "1:2", "--reference", "first", "--out", "second")
    assert truth.snip(*words)[0] == 0
    assert "finished already" in truth.snip(*words)[1]


def test_an_array_that_is_a_reference_too_is_refused(sets):
    x, folders = sets
    for array, reference in (
        (x, x), (x[:500], x[400:]), (x[:500], x[:500].copy()), (x[:166], folders[0]),
    ):  # fmt: skip
        with pytest.raises(SnipError, match="all its rows would be removed"):
            dedup(array, reference=reference)
    assert dedup(x[::2], reference=x[1::2], method="exact").removed > 0


def test_references_only_needs_references(sets, tmp_path):
    _, folders = sets
    words = ("dedup", folders[0], "--references_only", "--out", tmp_path / "o")
    assert "--reference" in refused(*words, status=2)
    out = tmp_path / "plain"
    assert truth.snip("dedup", folders[0], "--reference", folders[1], "--out", out)[0] == 0
    again = ("dedup", out, "--threshold", 0.97, "--reference", folders[1], "--references_only")
    assert "references_only" in refused(*again, "--out", tmp_path / "o", status=2)


def test_a_new_threshold_knows_references_by_whatever_name_they_had(sets, tmp_path, monkeypatch):
    x, _ = sets
    monkeypatch.chdir(tmp_path)
    words = ("--threshold", 0.9, "--reference", "set2,set1", "--references_only")
    assert truth.snip("dedup", "set0", *words, "--out", "one")[0] == 0
    assert truth.snip("dedup", "one", "--threshold", 0.95, "--out", "two")[0] == 0
    across = table_of(x)[:500, [*range(700, 900), *range(500, 700)]]
    expected = np.flatnonzero(across.max(1) >= np.float32(0.95))
    assert np.flatnonzero(np.load(tmp_path / "two" / "is_dup.npy")).tolist() == expected.tolist()
    first = {str(tmp_path / "set2"): 0, str(tmp_path / "set1"): 200}
    for row in groups_of(tmp_path / "two"):
        assert row["representative"] + first[row["reference"]] == across[row["row"]].argmax()


def test_other_references_are_other_settings(sets, tmp_path):
    _, folders = sets
    words = ("dedup", folders[0], "--out", tmp_path / "o")
    assert truth.snip(*words, "--reference", folders[1])[0] == 0
    assert "reference" in refused(*words, "--reference", folders[2])
    assert "reference" in refused(*words)


def test_rows_of_another_width_are_refused():
    with pytest.raises(SnipError, match="5 wide, those of FEATURES are 4"):
        dedup(np.eye(4), reference=np.eye(5))


@pytest.mark.parametrize(
    "how", [{"method": "adc"}, {"method": "semdedup"}, {"text_features": np.eye(4)}]
)
def test_what_does_not_go_with_references_is_wrong_usage(how):
    with pytest.raises(UsageError, match="reference"):
        dedup(np.eye(4), reference=np.eye(4), **how)


def test_an_array_cannot_be_the_reference_of_a_later_run(sets, tmp_path):
    x, folders = sets
    dedup(folders[0], reference=x[500:], out=str(tmp_path / "o"))
    assert "array" in refused("dedup", folders[2], "--reference", tmp_path / "o", "--out",
                              tmp_path / "p")  # fmt: skip
    assert "references" in refused("dedup", tmp_path / "o", "--threshold", 0.97, "--out",
                                   tmp_path / "p")  # fmt: skip


def test_one_input_named_twice_counts_once(sets):
    _, folders = sets
    twice = open_reference_rows(f"{folders[0]},{folders[1]},{folders[0]}")
    assert [item.name for item in twice.items] == [str(folders[0]), str(folders[1])]
    names, row = twice.locate(np.array([0, 499, 500, 699]))
    called = [item.name for item in twice.items]
    assert names.to_pylist() == [called[0], called[0], called[1], called[1]]
    assert row.tolist() == [0, 499, 0, 199]
    assert twice.numbers_of(called, np.array(names), row).tolist() == [0, 499, 500, 699]
    assert twice.numbers_of(["a", "b"], np.array(["b"]), np.array([7])).tolist() == [507]
    for name, which in (("c", 7), ("b", 200)):
        with pytest.raises(SnipError, match=f"row {which} of {name} is not a kept row"):
            twice.numbers_of(["a", "b"], np.array(["b", name]), np.array([7, which]))


def test_bad_rows_of_an_earlier_run_are_no_references(tmp_path):
    x = truth.clustered(60, 8, 1)
    x[7] = 0
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[8:20])
    out = tmp_path / "out"
    keep = ("--bad_rows", "keep")
    assert truth.snip("dedup", tmp_path / "a.npy", "--out", out, *keep)[0] == 0
    references = open_reference_rows(str(out))
    live = ~np.load(out / "is_dup.npy")
    live[7] = False
    assert references.items[0].kept.tolist() == np.flatnonzero(live).tolist()
    words = ("dedup", tmp_path / "b.npy", "--reference", out, "--out", tmp_path / "o")
    assert truth.snip(*words)[0] == 0
    assert np.load(tmp_path / "o" / "is_dup.npy").all()
