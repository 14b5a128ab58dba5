"""What pages and tables are made of: templates, places of rows, strangers' texts, charts.

Captions, keys and urls may hold what steers a terminal or breaks a page. They are shown on one
line, cut, and linked only where that is safe. Charts are places and labels; the SVG is in
``templates/charts.html.j2``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from snipdedup.errors import SnipError

if TYPE_CHECKING:
    from snipdedup.metadata.gather import RowTexts

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # line breaks among them
# White space, and what steers a terminal or the direction of writing.
STEERING = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
INT64_DIGITS = 18
URL_CHARS = 2048  # characters of a url that may be followed, at the most
GAP, WIDEST_GAP = 0.12, 0.004  # between bars: of a bar's width, of the plot's
HEIGHT = 220  # pixels of the plot; its labels lie outside
WIDE = 1000  # units of a line's own coordinates, stretched to the plot's width
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def require(module: str, what: str) -> None:
    """Refuse what needs a module of the extra ``report`` where that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SnipError(f"{what} needs {module}: pip install 'snipdedup-toolkit[report]'")


def environment() -> Any:
    """Return the jinja2 environment of the templates; every value in them is escaped."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {
        "number": "{:,}".format, "percent": percent, "cosine": cosine_text, "cut": page_text,
        "link": safe_link, "host": lambda link: urlsplit(link).hostname or "",
        "pixels": "{:.1f}".format, "place": x_place, "share": "{:.4g}".format,
    }  # fmt: skip
    templates.globals["height"] = HEIGHT
    return templates


def render_page(template: str, script: str = "", **values: Any) -> str:
    """Return a page from one of the templates.

    The page's own policy allows its style and its script only. With a script, a picture may come
    over http and https too, when the reader asks for it.
    """
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    rules = [f"default-src 'none'; style-src {content_hash(styles)}"]
    if script:
        rules += [f"script-src {content_hash(script)}", "img-src data: https: http:"]
    policy = "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])
    page = environment().get_template(template)
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


def is_number(text: str) -> bool:
    """Tell whether a stranger's text is a whole number from 0 on that an int64 can hold."""
    return text.isdecimal() and len(text) <= INT64_DIGITS


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


@dataclass
class ShownRow:
    """A row, where it lies, and its texts; None where unknown."""

    row: int
    shard: str
    shard_row: int
    key: str | None = None
    url: str | None = None
    caption: str | None = None


def fill_texts(shown: Sequence[ShownRow], texts: RowTexts, *names: str) -> None:
    """Set ``key``, ``url`` or ``caption`` of rows to what the metadata holds."""
    rows = np.array([one.row for one in shown], np.int64)
    for name, values in texts.about(rows, *names).items():
        for one in shown:
            setattr(one, name, values.get(one.row))


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


def y_place(value: float, low: float, high: float) -> float:
    """Return the place of a value on an axis from ``low`` to ``high``, in pixels from the top."""
    return HEIGHT * (1 - (value - low) / max(high - low, 1e-12))


def curve_chart(thresholds: np.ndarray, kept: np.ndarray, rows: int, mark: int) -> dict[str, Any]:
    """Return the chart of kept rows by threshold, (s,) each, with a cursor for the slider.

    ``rows`` are those of the whole set, ``mark`` the kept rows of this run, at the first threshold.
    The axis goes up to all rows, and is cut off below where that shows more.
    """
    low = float(min(kept.min(), mark))
    low = 0.0 if low < rows / 2 else low - 0.12 * (rows - low)
    high = max(float(rows), low + 1)
    start, end = float(thresholds[0]), float(thresholds[-1])
    span = max(end - start, 1e-12)
    y = [y_place(value, low, high) for value in kept.tolist()]
    places = zip(((thresholds - start) / span).tolist(), y, strict=True)
    return {
        "wide": WIDE,
        "points": " ".join(f"{WIDE * x:.1f},{y:.1f}" for x, y in places),
        "y": y,
        "dot": (0.0, y[0]),
        "mark": y_place(mark, low, high),
        "heights": [(y_place(t, low, high), compact(t)) for t in nice_ticks(low, high, 5)],
        "places": [((t - start) / span, f"{t:.4g}") for t in nice_ticks(start, end, 6)],
    }


def bar_chart(bars: Bars) -> dict[str, Any]:
    """Return the chart of a histogram, counts on a logarithmic axis."""
    top = math.ceil(math.log10(max(int(bars.counts.max(initial=1)), 2)) - 1e-9)
    foot = math.log10(0.5)  # so that a single one can be seen
    start, wide = float(bars.edges[0]), float(bars.edges[-1] - bars.edges[0])
    rects = []
    for number in np.flatnonzero(bars.counts):
        left, right = ((float(edge) - start) / wide for edge in bars.edges[number : number + 2])
        gap, count = min(GAP * (right - left), WIDEST_GAP), int(bars.counts[number])
        y = y_place(math.log10(count), foot, top)
        rects.append((left + gap / 2, right - left - gap, y, f"{bars.names[number]}: {count:,}"))
    return {
        "total": int(bars.counts.sum()),
        "last": int(bars.counts[-1]),
        "bars": rects,
        "heights": [(y_place(p, foot, top), compact(10.0**p)) for p in range(top + 1)],
        "places": [((x - start) / wide, label) for x, label in bars.ticks],
        "place": lambda x: (x - start) / wide,
    }


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
