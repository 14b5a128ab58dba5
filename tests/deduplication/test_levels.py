"""The threshold table: what star removes at each threshold, against brute force and a rerun."""

from __future__ import annotations

import numpy as np
import pytest
import truth

from snipdedup import dedup
from snipdedup.deduplication import levels

STEPS = [0.9, 0.91, 0.92, 0.93, 0.94]


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(2000, 12, 8, clusters=150, noise=0.45, copies=0.1, dtype=np.float16)


@pytest.fixture(scope="module")
def table(rows):
    cosines = truth.cosine_table(rows)
    cosines[(rows[:, None, :] == rows[None, :, :]).all(2)] = 1
    return cosines


def lines_of(result):
    return result.entries()["thresholds"]


@pytest.mark.parametrize("keep", ["first", "last"])
def test_star_is_that_of_brute_force(rows, table, keep):
    result = dedup(rows, threshold=0.9, method="exact", keep=keep)
    order = np.arange(len(rows))[:: 1 if keep == "first" else -1]
    lines = lines_of(result)
    assert [line["threshold"] for line in lines] == STEPS
    for line in lines:
        label = truth.components(len(rows), truth.pairs_of(table, line["threshold"]))
        _, stays = truth.star(table, line["threshold"], order)
        assert line["removed"] == np.count_nonzero(~stays)
        assert line["components"] == len(rows) - len(set(label))
        assert line["estimated"] is False
    counts = [line["removed"] for line in lines]
    assert len(set(counts)) == len(counts)  # so that no line can stand for another


@pytest.mark.parametrize("dropped", [[], [3, 5, 1999]])
def test_it_is_what_a_rerun_says(rows, tmp_path, dropped):
    lines = ["row,decision", "0,keep", "7,keep", *(f"{row},drop" for row in dropped)]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    np.save(tmp_path / "rows.npy", rows)
    more = {"reference": rows[::50] + np.float16(0.01)}
    found = dedup(rows, threshold=0.9, method="exact", **more)
    assert [line["removed"] for line in lines_of(found)] == [found.at(t).removed for t in STEPS]
    dedup(tmp_path / "rows.npy", out=tmp_path / "a", threshold=0.9, method="exact")
    decided = dedup(tmp_path / "a", out=tmp_path / "b", decisions=str(tmp_path / "d.csv"))
    assert [line["removed"] for line in lines_of(decided)] == [decided.at(t).removed for t in STEPS]


def test_large_groups_are_estimated_and_said_to_be(rows, monkeypatch):
    result = dedup(rows, threshold=0.9, method="exact")
    exact = lines_of(result)
    monkeypatch.setattr(levels, "DECIDED_ROWS", 800)
    sampled = lines_of(result)
    monkeypatch.setattr(levels, "DECIDED_ROWS", 1 << 16)
    monkeypatch.setattr(levels, "HUGE", 20)
    by_huge = lines_of(result)
    for lines in (sampled, by_huge):
        assert lines[0] == exact[0]  # decided in this run
        assert all(line["estimated"] for line in lines[1:])
        for line, truly in zip(lines[1:], exact[1:], strict=True):
            assert line["components"] == truly["components"]
            assert abs(line["removed"] - truly["removed"]) < 0.1 * truly["removed"]
        assert [line["removed"] for line in lines] != [line["removed"] for line in exact]
    assert lines_of(result) == by_huge  # the same again
    assert "~" in str(result)
    assert "estimated from some of the groups" in str(result)


def test_components_speak_of_components(rows):
    result = dedup(rows, threshold=0.9, method="exact", grouping="components")
    assert [line["removed"] for line in lines_of(result)] == [result.at(t).removed for t in STEPS]
    assert "components at threshold" in str(result)
    assert "removed by components" not in str(result)


def test_the_summary_names_both_groupings_and_the_way_down(rows):
    result = dedup(rows, threshold=0.9, method="exact")
    text, line = str(result), lines_of(result)[1]
    assert "star at threshold" in text
    assert f"{line['removed']:,}" in text
    assert f"{line['components']:,}" in text
    assert "removed by components" in text
    assert "below 0.9: search again, by snip dedup FEATURES --threshold T" in text
