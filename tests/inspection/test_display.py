"""Charts: the figures that are drawn are the figures that were given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from snipdedup.inspection import display


def parsed(svg):
    return ET.fromstring(svg)


def number(text):
    return float(text.rstrip("%"))


def test_numbers_on_an_axis():
    shown = [display.compact(v) for v in (0, 0.5, 12, 2048, 9999, 16384, 131072, 1 << 20, 3.5e9)]
    assert shown == ["0", "0.5", "12", "2048", "9999", "16.4k", "131k", "1.05M", "3.5G"]


@pytest.mark.parametrize("low", [0, 0.95, -1, 41_000, 0.761])
@pytest.mark.parametrize("span", [0.05, 0.3, 2, 17_000])
def test_ticks_are_round_inside_and_few(low, span):
    ticks = display.nice_ticks(low, low + span, 5)
    assert 2 <= len(ticks) <= 6
    assert min(ticks) >= low - 1e-9
    assert max(ticks) <= low + span + 1e-9
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step)
    assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 6) in (1, 2, 5)
    assert display.nice_ticks(1, 1, 5) == [1]


def test_bars_stand_for_their_counts():
    bars = display.Bars(
        np.array([0, 1, 2, 4.0]),
        np.array([1, 0, 1000]),
        ["a", "<b>", "c & d"],
        [(0, "0"), (4, "4")],
    )
    chart = parsed(display.bar_chart(bars, 'size "<x>"', "<said> & more"))
    assert chart.get("aria-label") == "<said> & more"
    rects = chart.findall("rect")
    assert [r.find("title").text for r in rects] == ["a: 1", "c & d: 1,000"]
    heights = [number(r.get("height")) for r in rects]
    assert heights[1] == pytest.approx(display.HEIGHT)  # 1000 is the top decade
    one = math.log10(2) / math.log10(2000)  # from the foot, 0.5, up
    assert heights[0] == pytest.approx(display.HEIGHT * one, abs=0.1)
    centres = [number(r.get("x")) + number(r.get("width")) / 2 for r in rects]
    assert centres == pytest.approx([12.5, 75])
    assert [t.text for t in chart.findall("text")] == [
        "1", "10", "100", "1000", "0", "4", 'size "<x>"',
    ]  # fmt: skip


def test_the_curve_and_its_cursor():
    thresholds, stays = np.array([0.9, 0.95, 1.0]), np.array([600, 800, 990])
    chart = parsed(display.curve_chart(thresholds, stays, 1000, 700, "said"))
    scale = display.kept_scale(stays, 1000)
    assert scale.y(1000) == 0  # all rows: what hangs from there goes
    line = chart.find("svg/polyline").get("points").split()
    points = [tuple(map(float, point.split(","))) for point in line]
    expected = [(x, scale.y(y)) for x, y in zip((0, 500, 1000), stays, strict=True)]
    assert np.allclose(points, expected, atol=0.06)
    dot, mark = chart.find("circle[@id='dot']"), chart.find("circle[@class='mark']")
    assert number(dot.get("cy")) == pytest.approx(scale.y(600), abs=0.06)
    assert number(mark.get("cy")) == pytest.approx(scale.y(700), abs=0.06)
    assert scale.low < 600


def test_one_threshold_only():
    parsed(display.curve_chart(np.array([1.0]), np.array([5]), 5, 5, "said"))


def test_few_rows_that_stay_are_shown_from_nought():
    assert display.kept_scale(np.array([10]), 1000).low == 0


@pytest.mark.parametrize("bins", [1, 5, 127, 128, 400, 4000])
def test_cosines_keep_their_sum_and_places(bins):
    rng = np.random.default_rng(0)
    edges = 1 - 0.0005 * np.arange(bins, -1, -1)
    counts = rng.integers(0, 50, bins + 1)
    bars = display.similarity_bars(edges, counts)
    assert bars.counts.sum() == counts.sum()
    assert bars.counts[-1] == counts[-1]
    assert len(bars.counts) == len(bars.names) == len(bars.edges) - 1 <= 130
    assert bars.edges[0] == edges[0]
    assert (np.diff(bars.edges) > 0).all()
    for place in range(len(bars.counts) - 2):
        low, high = bars.edges[place], bars.edges[place + 1]
        assert bars.counts[place] == counts[:-1][(edges[:-1] >= low) & (edges[:-1] < high)].sum()
    parsed(display.bar_chart(bars, "cosine", "said"))


def test_sizes_by_powers_of_two():
    bars = display.size_bars(np.array([2, 3, 4, 9, 1000]), np.array([10, 5, 3, 2, 1]))
    assert bars.counts.tolist() == [15, 3, 2, 0, 0, 0, 0, 0, 1]
    assert bars.names[0] == "2 to 3"
    assert bars.names[-1] == "512 to 1,023"
    assert bars.ticks[0] == (1.0, "2")
    one = display.size_bars(np.array([1]), np.array([4]))
    assert (one.counts.tolist(), one.names) == ([4], ["1"])
    none = display.size_bars(np.empty(0, np.int64), np.empty(0, np.int64))
    assert none.counts.sum() == 0
    parsed(display.bar_chart(none, "size", "said"))


def test_no_chart_has_a_style_or_a_script():
    bars = display.size_bars(np.array([2]), np.array([1]))
    assert not re.search(r"\sstyle=|<script|\son\w+=", display.bar_chart(bars, "x", "y"))
