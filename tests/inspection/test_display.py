"""Charts: the figures that are drawn are the figures that were given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from snipdedup.inspection import display


def svg_of(kind, chart):
    """A chart as the page has it."""
    draw = getattr(display.environment().get_template("charts.html.j2").module, kind)
    return str(draw(chart, 'size "<x>"', "<said> & more"))


def parsed(kind, chart):
    return ET.fromstring(svg_of(kind, chart))


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
    chart = parsed("bars", display.bar_chart(bars))
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
    drawn = display.curve_chart(thresholds, stays, 1000, 700)
    chart = parsed("curve", drawn)
    low = 600 - 0.12 * 400  # all rows are at the top: what hangs from there goes
    heights = [display.HEIGHT * (1000 - y) / (1000 - low) for y in stays]
    assert drawn["y"] == pytest.approx(heights)
    line = chart.find("svg/polyline").get("points").split()
    points = [tuple(map(float, point.split(","))) for point in line]
    assert np.allclose(points, list(zip((0, 500, 1000), heights, strict=True)), atol=0.06)
    dot, mark = chart.find("circle[@id='dot']"), chart.find("circle[@class='mark']")
    assert number(dot.get("cy")) == pytest.approx(heights[0], abs=0.06)
    assert number(mark.get("cy")) == pytest.approx(
        display.HEIGHT * (1000 - 700) / (1000 - low), abs=0.06
    )


def test_one_threshold_only():
    drawn = display.curve_chart(np.array([1.0]), np.array([5]), 5, 5)
    parsed("curve", drawn)


def test_few_rows_that_stay_are_shown_from_nought():
    drawn = display.curve_chart(np.array([0.9, 1]), np.array([10, 1000]), 1000, 10)
    assert drawn["y"] == pytest.approx([0.99 * display.HEIGHT, 0])


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
    parsed("bars", display.bar_chart(bars))


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
    parsed("bars", display.bar_chart(none))


def test_no_chart_has_a_style_or_a_script():
    bars = display.size_bars(np.array([2]), np.array([1]))
    assert not re.search(r"\sstyle=|<script|\son\w+=", svg_of("bars", display.bar_chart(bars)))
