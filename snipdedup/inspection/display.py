"""What pages and tables are made of: templates, places of rows, strangers' texts, charts.

Captions, keys and urls may hold what steers a terminal or breaks a page. They are shown on one
line, cut, and linked only where that is safe.

Charts are inline SVG: wide as the page, text as large on a phone as on a screen. Widths are per
cent, heights are pixels, so nothing is scaled. There are no styles in the SVG: the page's content
policy forbids them, and its style sheet knows the classes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from snipdedup.errors import SnipError

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # line breaks among them
# White space, and what steers a terminal or the direction of writing.
STEERING = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
URL_CHARS = 2048  # characters of a url that may be followed, at the most
GAP, WIDEST_GAP = 0.12, 0.004  # between bars: of a bar's width, of the plot's
HEIGHT = 220  # pixels of the plot; its labels lie outside
WIDE = 1000  # units of a line's own coordinates, stretched to the plot's width
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def require(module: str, what: str) -> None:
    """Refuse what needs a module of the extra ``report`` where that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SnipError(f"{what} needs {module}: pip install 'snipdedup-toolkit[report]'")


def render_page(template: str, script: str = "", **values: Any) -> str:
    """Return a page from one of the templates; every value in it is escaped.

    The page's own policy allows its style and its script only. With a script, a picture may come
    over http and https too, when the reader asks for it.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": "{:,}".format, "percent": percent, "cosine": cosine_text, "cut": page_text,
        "link": safe_link, "host": lambda link: urlsplit(link).hostname or "",
    }  # fmt: skip
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    rules = [f"default-src 'none'; style-src {content_hash(styles)}"]
    if script:
        rules += [f"script-src {content_hash(script)}", "img-src data: https: http:"]
    policy = "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])
    page = environment.get_template(template)
    return page.render(policy=policy, styles=styles, script=script, **values)


def content_hash(text: str) -> str:
    """Return the source of a content policy that allows this style or script only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percent(part: float, whole: float) -> str:
    """Return a share for reading."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def cosine_text(value: float) -> str:
    """Return a cosine for reading; one below 1 is never shown as 1."""
    if np.isnan(value):
        return "unknown"
    return "1" if value == 1 else f"{min(value, 0.9999):.4f}"


def page_text(text: str | None, most: int) -> str:
    """Return a text for a page: on one line, at most so many characters."""
    text = CONTROL.sub(" ", (text or "")[: 4 * most]).strip()
    return text if len(text) <= most else text[:most].rstrip() + "…"


def terminal_text(text: str, most: int | None = None) -> str:
    """Return a text for a terminal: on one line, nothing that steers it, cut to a width."""
    text = STEERING.sub(" ", text).strip()
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def safe_link(url: str | None) -> str:
    """Return a url that may be followed, else nothing: http or https with a host, nothing odd."""
    url = url or ""
    odd = any(c.isspace() or c in "\\\"'<>`" for c in url)
    if odd or len(url) > URL_CHARS or CONTROL.search(url):
        return ""
    try:
        parts = urlsplit(url)
        usual = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return ""
    return url if usual else ""


def shard_offsets(shards: list[dict[str, Any]]) -> np.ndarray:
    """Return the first row of each shard of a manifest, then the number of rows."""
    return np.cumsum([0, *(shard["rows"] for shard in shards)], dtype=np.int64)


def places_of(shards: list[dict[str, Any]], rows: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return each row's ``shard`` and ``shard_row``, by the shards of a manifest."""
    offsets, places = shard_offsets(shards), {}
    for row in rows:
        number = int(np.searchsorted(offsets, row, side="right")) - 1
        place = {"shard": str(shards[number]["name"]), "shard_row": row - int(offsets[number])}
        places[row] = place
    return places


@dataclass(frozen=True)
class Bars:
    """A histogram with a logarithmic axis of counts."""

    edges: np.ndarray  # (n + 1,) float64: places of the bars in the x axis's own units
    counts: np.ndarray  # (n,) int64
    names: list[str]  # what each bar counts
    ticks: list[tuple[float, str]]  # places and labels on the x axis


def compact(value: float) -> str:
    """Return a number as an axis shows it: 12, 2048, 20k, 3.5M."""
    for unit, sign in UNITS:
        if value >= max(unit, 10_000):  # 2048 says more than 2.05k
            return f"{value / unit:.3g}{sign}"
    return f"{value:.10g}"


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= least * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * k, 10) for k in range(first, last + 1)]


def x_place(part: float) -> str:
    """Return a place along the x axis, 0 to 1, as SVG has it."""
    return f"{100 * part:.3f}".rstrip("0").rstrip(".") + "%"


def chart_svg(words: str, axis: str, body: Sequence[str]) -> str:
    """Return a whole chart: its accessible name, what it shows, and the x axis's name."""
    return (
        f'<svg class="plot" role="img" aria-label="{escape(words)}" width="100%" '
        f'height="{HEIGHT}">{"".join(body)}'
        f'<line class="axis" x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>'
        f'<text class="name" x="100%" y="{HEIGHT + 38}" text-anchor="end">{escape(axis)}</text>'
        "</svg>"
    )


def grid_lines(ticks: Sequence[tuple[float, str]]) -> str:
    """Return horizontal lines with labels, at heights in pixels."""
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="-10" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for y, label in ticks
    )


def axis_labels(ticks: Sequence[tuple[float, str]]) -> str:
    """Return labels below the x axis, at places from 0 to 1."""
    return "".join(
        f'<line class="tick" x1="{x_place(x)}" x2="{x_place(x)}" y1="{HEIGHT}" y2="{HEIGHT + 5}"/>'
        f'<text x="{x_place(x)}" y="{HEIGHT + 20}" text-anchor="middle">{escape(label)}</text>'
        for x, label in ticks
    )


@dataclass(frozen=True)
class Scale:
    """A linear y axis."""

    low: float
    high: float

    def y(self, value: float) -> float:
        """Return the place of a value in pixels from the top."""
        return HEIGHT * (1 - (value - self.low) / max(self.high - self.low, 1e-12))


def kept_scale(kept: np.ndarray, rows: int) -> Scale:
    """Return the axis of kept rows: up to all rows, cut off below where that shows more."""
    low = float(kept.min())
    low = 0.0 if low < rows / 2 else low - 0.12 * (rows - low)
    return Scale(low, max(float(rows), low + 1))


def curve_chart(thresholds: np.ndarray, kept: np.ndarray, rows: int, mark: int, words: str) -> str:
    """Draw kept rows against the threshold, (s,) each, with a cursor for the slider.

    ``rows`` are those of the whole set, ``mark`` the kept rows of this run, at the first threshold;
    ``words`` say what the chart shows.
    """
    scale = kept_scale(np.append(kept, mark), rows)
    start, end = float(thresholds[0]), float(thresholds[-1])
    places = (thresholds - start) / max(end - start, 1e-12)
    points = " ".join(f"{WIDE * x:.1f},{scale.y(y):.1f}" for x, y in zip(places, kept, strict=True))
    ticks = nice_ticks(scale.low, scale.high, 5)
    y, x = scale.y(float(kept[0])), x_place(float(places[0]))
    axis = [((t - start) / max(end - start, 1e-12), f"{t:.4g}") for t in nice_ticks(start, end, 6)]
    body = [
        f'<svg viewBox="0 0 {WIDE} {HEIGHT}" preserveAspectRatio="none" width="100%" '
        f'height="{HEIGHT}"><polygon class="area" points="0,0 {points} {WIDE},0"/>'
        f'<polyline class="curve" points="{points}"/></svg>',
        grid_lines([(scale.y(t), compact(t)) for t in ticks]),
        axis_labels(axis),
        f'<line id="cursor" class="cursor" x1="{x}" x2="{x}" y1="0" y2="{HEIGHT}"/>',
        f'<circle class="mark" cx="0" cy="{scale.y(mark):.1f}" r="5"/>',
        f'<circle id="dot" class="dot" cx="{x}" cy="{y:.1f}" r="6"/>',
    ]
    return chart_svg(words, "threshold (cosine)", body)


def bar_chart(bars: Bars, axis: str, words: str) -> str:
    """Draw a histogram, counts on a logarithmic axis."""
    top = math.ceil(math.log10(max(int(bars.counts.max(initial=1)), 2)) - 1e-9)
    foot = math.log10(0.5)  # so that a single one can be seen
    scale = Scale(foot, top)
    start, wide = float(bars.edges[0]), float(bars.edges[-1] - bars.edges[0])
    body = [grid_lines([(scale.y(power), compact(10.0**power)) for power in range(top + 1)])]
    for number in np.flatnonzero(bars.counts):
        left, right = ((float(bars.edges[number + k]) - start) / wide for k in (0, 1))
        gap = min(GAP * (right - left), WIDEST_GAP)
        left, right = left + gap / 2, right - gap / 2
        y = scale.y(math.log10(int(bars.counts[number])))
        body.append(
            f'<rect class="bar" x="{x_place(left)}" y="{y:.1f}" width="{x_place(right - left)}" '
            f'height="{HEIGHT - y:.1f}"><title>{escape(bars.names[number])}: '
            f"{int(bars.counts[number]):,}</title></rect>"
        )
    body.append(axis_labels([((x - start) / wide, label) for x, label in bars.ticks]))
    return chart_svg(words, axis, body)


def similarity_bars(edges: np.ndarray, counts: np.ndarray, most: int = 128) -> Bars:
    """Return bars of cosines, at ``most`` so many; the last stands for those of exactly 1.

    ``edges`` are lower ends, (n,), the last one 1. Neighbours are added up until they fit.
    """
    width = -(-(len(edges) - 1) // (most - 1))
    starts = np.arange((len(edges) - 1) % width - width, len(edges) - 1, width)
    starts = np.clip(starts[starts + width > 0], 0, None)
    lows, sums = edges[starts], np.add.reduceat(counts[:-1], starts)
    step = float(edges[-1] - edges[-2]) * width
    highs = np.append(lows[1:], 1.0)
    names = [f"{a:.4f} up to {b:.4f}" for a, b in zip(lows, highs, strict=True)]
    ticks = [(t, f"{t:.4g}") for t in nice_ticks(float(lows[0]), 1 - 4 * step, 5)]
    return Bars(
        edges=np.concatenate([lows, [1, 1 + step, 1 + 3 * step]]),  # a gap, then exactly 1
        counts=np.concatenate([sums, [0], counts[-1:]]),
        names=[*names, "", "exactly 1"],
        ticks=[*ticks, (1 + 2 * step, "= 1")],
    )


def size_bars(values: np.ndarray, counts: np.ndarray) -> Bars:
    """Return bars by powers of two: distinct whole numbers from 1 on, (n,), and their counts."""
    if not len(values):
        values, counts = np.ones(1), np.zeros(1, np.int64)
    powers = np.floor(np.log2(values)).astype(np.int64)
    low, high = int(powers.min()), int(powers.max()) + 1
    sums = np.zeros(high - low, np.int64)
    np.add.at(sums, powers - low, counts)
    spans = [(2**p, 2 ** (p + 1) - 1) for p in range(low, high)]
    names = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in spans]
    skip = 1 + (high - low) // 8  # as many labels as a phone has room for
    ticks = [(float(p), compact(2.0**p)) for p in range(low, high + 1, skip)]
    return Bars(np.arange(low, high + 1, dtype=np.float64), sums, names, ticks)
