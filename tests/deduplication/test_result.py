"""The result: ratios and tables derive from one decision, other thresholds from the forest."""

from __future__ import annotations

import numpy as np
import pytest
import truth
from samples import write_laion

import snipdedup
from snipdedup import dedup
from snipdedup.deduplication.levels import tabulate
from snipdedup.errors import SnipError, UsageError


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(1500, 12, 3, clusters=300, noise=0.5, copies=0.1, dtype=np.float16)


@pytest.fixture(scope="module")
def found(rows):
    return dedup(rows, threshold=0.9, method="exact")


def test_counts_derive_from_the_mask(found, rows):
    assert found.is_dup.dtype == bool
    assert found.is_dup.shape == (len(rows),)
    assert found.rows == len(rows)
    assert found.removed == found.is_dup.sum() > 100
    assert found.kept == len(rows) - found.removed
    assert found.duplicate_ratio == found.removed / len(rows)
    assert found.chained == 0
    assert len(rows[~found.is_dup]) == found.kept


def test_tables_have_the_columns_and_types_of_the_format(found):
    schema = [(field.name, str(field.type)) for field in found.groups.schema]
    assert schema == [
        ("row", "int64"),
        ("shard", "string"),
        ("shard_row", "int64"),
        ("key", "string"),
        ("group", "int64"),
        ("representative", "int64"),
        ("similarity", "float"),
        ("is_dup", "bool"),
    ]
    schema = [(field.name, str(field.type)) for field in found.forest.schema]
    assert schema == [("a", "int64"), ("b", "int64"), ("similarity", "float")]
    nothing = dedup(np.eye(5))
    assert nothing.groups.schema == found.groups.schema
    assert nothing.forest.schema == found.forest.schema
    assert (nothing.groups.num_rows, nothing.forest.num_rows, nothing.removed) == (0, 0, 0)


def test_the_forest_has_fewer_edges_than_rows_and_joins_each_group(found, rows):
    edges = found.forest.to_pydict()
    assert all(a < b for a, b in zip(edges["a"], edges["b"], strict=True))
    table = truth.cosine_table(rows)
    table[(rows[:, None, :] == rows[None, :, :]).all(2)] = 1
    assert edges["similarity"] == table[edges["a"], edges["b"]].tolist()
    label = truth.components(len(rows), truth.pairs_of(table, 0.9))
    of_forest = truth.components(len(rows), zip(edges["a"], edges["b"], strict=True))
    assert np.array_equal(label, of_forest)
    assert found.forest.num_rows == len(rows) - len(set(label))


@pytest.mark.parametrize("threshold", [0.9, 0.97, 1.0])
@pytest.mark.parametrize("grouping", ["star", "components"])
@pytest.mark.parametrize("keep", ["first", "last", "random"])
def test_another_threshold_is_a_fresh_run(rows, threshold, grouping, keep):
    fresh = dedup(rows, threshold=threshold, grouping=grouping, keep=keep, seed=5, method="exact")
    again = dedup(rows, threshold=0.9, keep=keep, seed=5, method="exact").at(threshold, grouping)
    assert np.array_equal(again.is_dup, fresh.is_dup)
    assert again.groups.equals(fresh.groups)
    assert (again.threshold, again.grouping) == (threshold, grouping)
    assert again.chained == fresh.chained


def test_at_keeps_the_grouping_unless_told(rows):
    found = dedup(rows, threshold=0.9, grouping="components", method="exact")
    assert found.at(0.95).grouping == "components"
    assert found.at(0.95, grouping="star").grouping == "star"
    assert found.at(0.95).at(0.92).threshold == 0.92  # back, above what was searched


def test_a_lower_threshold_is_refused(found):
    with pytest.raises(
        SnipError, match=r"made at threshold 0\.9.* expected 0\.9 or more, found 0\.89"
    ):
        found.at(0.89)


@pytest.mark.parametrize(
    ("threshold", "grouping"), [(float("nan"), None), (1.5, None), (0.95, "componets")]
)
def test_what_no_search_could_have_is_refused(found, threshold, grouping):
    with pytest.raises(UsageError):
        found.at(threshold, grouping)


def test_a_row_names_its_shard(rows, tmp_path):
    folder = truth.save_shards(tmp_path / "f", rows, [0, 700, 700, 701])
    groups = dedup(folder, threshold=0.9, method="exact").groups.to_pydict()
    starts = {"img_emb_1.npy": 0, "img_emb_3.npy": 700, "img_emb_4.npy": 701}
    assert set(groups["shard"]) == set(starts)
    for row, shard, place in zip(groups["row"], groups["shard"], groups["shard_row"], strict=True):
        assert row == starts[shard] + place
    assert set(groups["key"]) == {None}


def test_levels_are_what_components_would_remove(found, rows):
    lines = tabulate(found.search, [0.9, 0.95, 1.0], None, None)
    for line in lines:
        fresh = dedup(rows, threshold=line["threshold"], grouping="components", method="exact")
        sizes = np.bincount(fresh.members.group)
        assert line["removed"] == fresh.removed
        assert line["groups"] == (sizes > 0).sum()
        assert line["largest"] == sizes.max()
    (line,) = tabulate(dedup(np.eye(3)).search, [0.95], None, None)
    assert (line["removed"], line["groups"], line["largest"]) == (0, 0, 1)


@pytest.mark.parametrize(
    "how", [{}, {"method": "semdedup", "clusters": 9}, {"keep": "max:n", "grouping": "components"}]
)
def test_a_finished_folder_opens_as_the_result_that_wrote_it(rows, tmp_path, how):
    write_laion(tmp_path / "set", rows, cuts=(200, 450))
    made = dedup(tmp_path / "set", out=tmp_path / "out", threshold=0.9, **how)
    found = snipdedup.open_result(tmp_path / "out")
    assert np.array_equal(found.is_dup, made.is_dup)
    assert found.groups.equals(made.groups)
    assert found.forest.equals(made.forest)
    assert np.array_equal(found.at(0.97).is_dup, made.at(0.97).is_dup)
    assert str(found) == str(made)
    assert str(found).endswith(f"written to {tmp_path / 'out'}")
    assert str(dedup(tmp_path / "set", threshold=0.9, **how)).splitlines()[1] in str(found)


def test_a_folder_that_is_not_finished_does_not_open(rows, tmp_path):
    with pytest.raises(SnipError, match="expected a finished dedup folder"):
        snipdedup.open_result(tmp_path)
    folder = truth.save_shards(tmp_path / "set", rows, [700])
    dedup(folder, out=tmp_path / "out", threshold=0.9)
    np.save(folder / "img_emb_0.npy", rows[:700][::-1])
    with pytest.raises(SnipError, match="not those that were searched"):
        snipdedup.open_result(tmp_path / "out")


def test_the_library_is_what_the_package_shows():
    assert snipdedup.dedup is dedup
    assert isinstance(dedup(np.eye(2)), snipdedup.Result)
    with pytest.raises(AttributeError, match="nothing"):
        _ = snipdedup.nothing
