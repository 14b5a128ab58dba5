"""The sections of the page of ``snip report``: what each one shows, for the template.

To add a section: its values in `render`, its HTML in ``templates/report.html.j2``.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.read_out import KEEPS, Curve, Survey
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members
from snipdedup.inspection import charts

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = '<meta name="generator" content="snip report">'
PICTURED = '<meta name="snip-pictures"'  # stands in a page that has some
SHARDS = 400  # lines of the table at the most
LISTED = 6  # entries of the manifest's lists as shown


@dataclass(frozen=True)
class Row:
    """One row as the page shows it: its texts are cut, and empty where unknown.

    ``caption_length`` is that of the whole caption, ``link`` the url if it is safe to follow,
    ``host`` what it names, ``picture`` a ``data:`` URL of a thumbnail.
    """

    row: int
    shard: str
    shard_row: int
    removed: bool = False
    key: str = ""
    caption: str = ""
    caption_length: int = 0
    url: str = ""
    link: str = ""
    host: str = ""
    picture: str = ""


@dataclass(frozen=True)
class PictureCounts:
    """Rows shown, pictures found of them, whether any were wanted, and what could not be used."""

    rows: int
    found: int = 0
    wanted: bool = False
    unreadable: int = 0
    ambiguous: int = 0


def render(
    title: str,
    out: str,
    manifest: dict[str, Any],
    *,
    curve: Curve | None,
    survey: Survey,
    rows: dict[int, Row],
    pictures: PictureCounts,
    sizes: dict[str, tuple[np.ndarray, np.ndarray]],
    removed: list[int],
    asked: dict[int, tuple[int, float] | None],
) -> str:
    """Return the page.

    Parameters
    ----------
    title, out : str
        Name of the folder; the folder as it is typed in a shell.
    manifest : dict
    curve : Curve or None
        None where no cosine is known.
    survey : Survey
    rows : dict of int to Row
        All that are shown.
    pictures : PictureCounts
    sizes : dict
        ``group_size`` and ``dup_count``: (values, counts).
    removed : list of int
        Removed rows, by shard.
    asked : dict of int to (int, float) or None
        Rows that were asked for: representative and cosine, None without a match.
    """
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    script = (TEMPLATES / "report.js").read_text("utf-8")
    counts, settings = manifest["counts"], manifest["settings"]

    def pairs(shown: Members) -> list[tuple[Row, Row | int, float]]:
        """Return rows, each with its representative (a reference's: its number) and the cosine."""
        members = zip(
            shown.row.tolist(), shown.representative.tolist(), shown.similarity, strict=True
        )
        return [(rows[a], rows.get(b, ~b), float(similarity)) for a, b, similarity in members]

    return render_template(
        "report.html.j2",
        generator=GENERATOR,
        pictured=PICTURED,
        # Pictures may come over http and https when the reader asks for one; none is in the page.
        policy=f"default-src 'none'; style-src {content_hash(styles)}; "
        f"script-src {content_hash(script)}; img-src data: https: http:; base-uri 'none'; "
        "form-action 'none'",
        styles=styles,
        script=script,
        title=title,
        out=out,
        counts=counts,
        settings=settings,
        verified=manifest["verified"],
        version=manifest["versions"]["snipdedup"],
        survey=survey,
        pictures=pictures,
        curve=None if curve is None else curve_section(curve, counts),
        charts=histograms(survey, sizes),
        bands=[(band, pairs(band.shown)) for band in survey.bands if band.rows],
        below=(survey.below, pairs(survey.below.shown)),
        groups=[(group, pairs(group.shown)) for group in survey.largest],
        copied=[
            (rows[row], count)
            for row, count in zip(survey.copied.tolist(), survey.copies.tolist(), strict=True)
        ],
        asked=asked_section(asked, rows),
        spared=[
            (rows[row], rows[int(other)])
            for row, other in zip(survey.spared.row.tolist(), survey.spared_by, strict=True)
        ],
        known_keep=settings["keep"] in KEEPS,
        shards=shard_section(manifest["shards"], removed, survey.foreign.tolist()),
        manifest=json.dumps(shortened(manifest), indent=2, ensure_ascii=False),
    )


def require_jinja(what: str) -> None:
    """Refuse where jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SnipError(f"{what} needs jinja2: pip install 'snipdedup-toolkit[report]'") from None


def render_template(name: str, **values: Any) -> str:
    """Return a page from one of the templates; every value in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": "{:,}".format, "percent": percent, "cosine": cosine}
    return environment.get_template(name).render(**values)


def content_hash(text: str) -> str:
    """Return the source of a content policy that allows this style or script only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percent(part: float, whole: float) -> str:
    """Return a share for reading."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def cosine(value: float) -> str:
    """Return a cosine for reading; one below 1 is never shown as 1."""
    if np.isnan(value):
        return "unknown"
    return "1" if value == 1 else f"{min(value, 0.9999):.4f}"


def curve_section(curve: Curve, counts: dict[str, int]) -> dict[str, Any]:
    """Return the slider's figures and chart."""
    kept = counts["rows"] - curve.removed
    thresholds = np.array([float(text) for text in curve.thresholds])
    scale = charts.kept_scale(np.append(kept, counts["kept"]), counts["rows"])
    words = (
        f"Kept rows, by threshold: {kept[0]:,} at {curve.thresholds[0]}, rising to "
        f"{kept[-1]:,} at {curve.thresholds[-1]}"
    )
    removed, groups = curve.removed.tolist(), curve.groups.tolist()
    return {
        "svg": charts.curve_chart(thresholds, kept, counts["rows"], counts["kept"], words),
        "lines": list(zip(curve.thresholds, removed, kept.tolist(), groups, strict=True)),
        "data": {
            "thresholds": curve.thresholds,
            "removed": removed,
            "groups": groups,
            "rows": counts["rows"],
            "y": [round(scale.y(value), 1) for value in kept.tolist()],
        },
    }


def histograms(survey: Survey, sizes: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, str]:
    """Return the charts of cosines, group sizes and dup_count."""
    (group_sizes, groups), (copies, rows) = sizes["group_size"], sizes["dup_count"]
    return {
        "similarity": charts.bar_chart(
            charts.similarity_bars(survey.edges, survey.similarities),
            "cosine with the representative",
            "Removed rows by cosine with their representatives: "
            f"{int(survey.similarities.sum()):,} rows, {int(survey.similarities[-1]):,} of them "
            "exactly 1",
        ),
        "sizes": charts.bar_chart(
            charts.size_bars(group_sizes, groups),
            "rows in the group",
            f"Groups by number of rows: {int(groups.sum()):,} groups, from 2 to "
            f"{int(group_sizes.max(initial=2)):,} rows",
        ),
        "copies": charts.bar_chart(
            charts.size_bars(copies, rows),
            "rows removed for it (dup_count)",
            f"Kept rows by dup_count: {int(rows.sum()):,} stand for others, at most for "
            f"{int(copies.max(initial=0)):,}",
        ),
    }


def asked_section(
    asked: dict[int, tuple[int, float] | None], rows: dict[int, Row]
) -> list[tuple[Row, Row | int | None, float]]:
    """Return rows that were asked for, with their representatives; None where they are kept."""
    shown: list[tuple[Row, Row | int | None, float]] = []
    for row, partner in asked.items():
        other, similarity = partner or (row, np.nan)
        known = rows.get(other, int(~other)) if rows[row].removed else None
        shown.append((rows[row], known, similarity))
    return shown


def shard_section(
    shards: list[dict[str, Any]], removed: list[int], foreign: list[int]
) -> dict[str, Any]:
    """Return a line for each shard; of very many those that lose the largest share."""
    lines = [
        (shard["name"], shard["rows"], *counts)
        for shard, *counts in zip(shards, removed, foreign, strict=True)
    ]
    if len(lines) > SHARDS:
        lines.sort(key=lambda line: -line[2] / max(line[1], 1))
    return {"lines": lines[:SHARDS], "all": len(lines)}


def shortened(value: Any) -> Any:
    """Return a JSON value with long lists and objects cut."""
    if isinstance(value, dict):
        short = {key: shortened(item) for key, item in list(value.items())[: 10 * LISTED]}
        more = len(value) - len(short)
        return {**short, "...": f"{more:,} more"} if more else short
    if isinstance(value, list):
        more = len(value) - LISTED
        return [*map(shortened, value[:LISTED]), *([f"... {more:,} more"] if more > 0 else [])]
    return value
