"""The last check of a result: whatever was found or chosen, no row goes without a reason."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import dedup
from snipdedup.deduplication import result, run
from snipdedup.errors import InternalError
from snipdedup.features.shards import open_features
from snipdedup.groups import pairs
from snipdedup.groups.members import NO_PAIR
from snipdedup.join.forest import join_edges, make_edges
from snipdedup.storage import external_sort


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(600, 8, 4, clusters=90, noise=0.4, copies=0.1)


def far_pair(x):
    """Two rows that are no pair by far, and in no group with each other."""
    return 0, int(np.argmin(truth.cosine_table(x)[0]))


def with_edge(found, a, b):
    """A search that found one pair more, of two rows that are none."""
    more = make_edges(np.array([a]), np.array([b]), np.array([0.995], np.float32))
    return dataclasses.replace(found, forest=join_edges([found.forest, more]))


def tampered(change):
    """Members as rules left them, changed before they are proved."""
    chosen = result.choose

    def choose(*given, **named):
        done = chosen(*given, **named)
        columns = [np.array(column) for column in done.members]
        members = done.members._replace(**dict(zip(done.members._fields, columns, strict=True)))
        change(members)
        return dataclasses.replace(done, members=members)

    return mock.patch.object(run, "choose", choose)


def test_a_pair_that_is_none_ends_the_run_and_names_the_row(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    search = run.search_pairs
    folder = truth.save_shards(tmp_path / "img", x, [20])

    def wrong(*given):
        return with_edge(search(*given), 3, 41)

    with mock.patch("snipdedup.deduplication.run.search_pairs", wrong):
        status, said, line = truth.snip("dedup", folder, "--out", tmp_path / "out")
    assert (status, said) == (1, "")
    cosine = truth.cosine_table(x)[3, 41]
    assert "internal error: row 41 (img_emb_1.npy, row 21) is removed for row 3, but" in line
    assert f"their cosine is {cosine:.7g}, for a threshold of 0.95" in line
    assert "nothing was written" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]


def test_what_was_there_stays_when_a_result_is_refused(rows, tmp_path):
    out = tmp_path / "out"
    dedup(rows, out=out)
    before = (out / "groups.parquet").read_bytes()
    search = run.search_pairs

    def wrong(*given):
        return with_edge(search(*given), *far_pair(rows))

    with (
        mock.patch("snipdedup.deduplication.run.search_pairs", wrong),
        mock.patch("snipdedup.groups.star.star_listed", all_for_the_first),
        pytest.raises(InternalError),
    ):
        dedup(rows, out=out, overwrite=True)
    assert (out / "groups.parquet").read_bytes() == before


def all_for_the_first(rows, sizes, compare, out, stay):
    """A star rule that is wrong: all of a group go for its first row."""
    del compare, out, stay
    named = np.repeat(rows[np.cumsum(sizes) - sizes], sizes)
    return named, np.where(named == rows, np.float32(1), NO_PAIR)


def test_components_may_chain_and_the_count_is_of_the_cosines_that_are_written(rows):
    found = dedup(rows, grouping="components", threshold=0.9, method="exact")
    table = truth.cosine_table(rows)
    table[(rows[:, None, :] == rows[None, :, :]).all(2)] = 1
    members = found.members
    assert members.similarity.tolist() == table[members.row, members.representative].tolist()
    assert found.chained == (members.similarity < np.float32(0.9)).sum() > 0


@pytest.mark.parametrize("grouping", ["star", "components"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("row", 600),
        ("row", -1),
        ("row", "first"),
        ("representative", 600),
        ("representative", -1),
        ("representative", "own"),
        ("representative", "other"),
        ("is_dup", False),
        ("group", -5),
    ],
)
def test_rows_that_are_none_or_go_for_none_end_the_run(rows, grouping, column, value):
    """No such row; twice there; removed for no row, itself, or a row of another group."""
    entry = {}

    def change(members):
        at = np.flatnonzero(members.is_dup)[5]
        values = {
            "first": members.row[0],
            "own": members.row[at],
            "other": members.row[~members.is_dup][-1],
        }
        getattr(members, column)[at] = values.get(value, value)
        entry.update({name: column[at] for name, column in members._asdict().items()})

    with tampered(change), pytest.raises(InternalError) as error:
        dedup(rows, grouping=grouping, threshold=0.9, method="exact")
    assert f"internal error: row {entry['row']:,}" in str(error.value)
    assert f"of 600 has a wrong entry in group {entry['group']}, where it is " in str(error.value)
    assert f"row {entry['representative']}; nothing was written" in str(error.value)


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_a_row_that_goes_stands_for_none(grouping):
    x = np.repeat(np.eye(3, dtype=np.float32), 3, axis=0)

    def change(members):
        members.representative[2] = members.row[1]

    with (
        tampered(change),
        pytest.raises(InternalError, match=r"row 2 .* wrong entry in group 0, .* for row 1;"),
    ):
        dedup(x, grouping=grouping, method="exact")


def test_a_row_that_cannot_be_compared_is_in_no_group():
    x = np.repeat(np.eye(3, dtype=np.float32), 3, axis=0)
    found = dedup(x, method="exact")
    wrong = dataclasses.replace(found.search, bad=np.array([4]))
    with pytest.raises(InternalError, match=r"row 4 .* wrong entry in group 3"):
        result.checked(dataclasses.replace(found, search=wrong))


def test_unverified_pairs_have_no_cosines_but_are_rows(rows, tmp_path):
    folder = truth.save_shards(tmp_path / "img", rows, [300])
    assert truth.snip("index", folder, "--out", tmp_path / "index", "--nlist", 4, "--m", 4)[0] == 0
    how = {"index": str(tmp_path / "index"), "method": "adc"}
    found = dedup(None, **how)
    gone = found.members.is_dup
    assert gone.sum() > 10
    assert np.isnan(found.members.similarity[gone]).all()
    assert (found.members.similarity[~gone] == 1).all()

    def change(members):
        members.representative[members.is_dup] = 700

    with tampered(change), pytest.raises(InternalError, match="wrong entry in group"):
        dedup(None, **how)


def test_captions_must_match_too(rows):
    text = np.random.default_rng(1).standard_normal(rows.shape).astype(np.float32)
    found = dedup(rows, text_features=rows, threshold=0.9)
    (second,) = found.search.inputs.seconds
    seconds = (second._replace(features=open_features(text), name="other"),)
    inputs = dataclasses.replace(found.search.inputs, seconds=seconds)
    wrong = dataclasses.replace(found.search, inputs=inputs)
    with pytest.raises(InternalError, match=r"their cosine in other is .*threshold of 0\.9"):
        result.checked(dataclasses.replace(found, search=wrong))


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_rows_that_go_for_a_reference_row_match_it(rows, grouping):
    def change(members):
        other = np.flatnonzero(members.representative < 0)
        table = truth.cosine_table(np.concatenate([rows[:200], rows[200:][members.row[other]]]))
        members.representative[other] = ~table[200:, :200].argmin(1)

    how = {"reference": rows[:200], "threshold": 0.9, "grouping": grouping, "method": "exact"}
    assert dedup(rows[200:], **how).counts.for_reference > 20
    if grouping == "star":
        with tampered(change), pytest.raises(InternalError, match="of reference 0, but"):
            dedup(rows[200:], **how)
    search = run.search_pairs

    def wrong(*given):
        found = search(*given)
        nearest = found.nearest
        far = truth.cosine_table(rows)[200:, :200][nearest.row].argmin(1)
        return dataclasses.replace(found, nearest=nearest._replace(reference=far))

    with (
        mock.patch("snipdedup.deduplication.run.search_pairs", wrong),
        pytest.raises(InternalError, match="of reference 0, but their cosine"),
    ):
        dedup(rows[200:], **how)


def test_semdedup_asks_for_more_than_the_threshold():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    found = dedup(x, method="semdedup", threshold=0.9, clusters=1)
    level = float(found.members.similarity[found.members.is_dup].min())
    with pytest.raises(InternalError, match="but their cosine is"):
        result.checked(dataclasses.replace(found, threshold=level))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_cosines_are_those_of_the_rows_as_stored_whatever_the_blocks(rows, kind, tmp_path):
    x = rows.astype(kind)
    one = dedup(x[200:], reference=x[:200].astype(np.float64), threshold=0.9, keep="last")
    with (
        mock.patch.object(pairs, "GATHER_PAIRS", 3),
        mock.patch.object(external_sort, "HELD", 40),
    ):
        out = dedup(x[200:], reference=x[:200].astype(np.float64), threshold=0.9, keep="last",
                    out=tmp_path / "out")  # fmt: skip
    table = truth.cosine_table(x)
    table[(x[:, None, :] == x[None, :, :]).all(2)] = 1
    for groups in (one.groups, out.groups, pq.read_table(tmp_path / "out" / "groups.parquet")):
        for row in groups.to_pylist():
            of = row["row"] + 200
            named = row["representative"] + (0 if row["reference"] else 200)
            assert row["similarity"] == table[of, named]
            near = table[of, :200].max()
            assert row["reference_similarity"] == (near if near >= np.float32(0.9) else None)
