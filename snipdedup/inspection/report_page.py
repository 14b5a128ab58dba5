"""The page of ``snip report``: what it shows of what was found, in the form its template takes."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.out_reader import KEEPS, Band, Curve, Group, Survey
from snipdedup.groups.members import Members
from snipdedup.inspection import charts

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = '<meta name="generator" content="snip report">'
PICTURED = '<meta name="snip-pictures"'  # stands in a page that has some
SHARDS = 400  # lines of the table at the most
LISTED = 6  # entries of the manifest's lists as shown


@dataclass(frozen=True)
class Row:
    """One row as the page shows it.

    Attributes
    ----------
    row, shard, shard_row
        Where it lies.
    goes : bool
        It is removed.
    key, caption, url : str
        Cut and without control characters; empty where unknown.
    caption_length : int
        Of the whole caption.
    link, host : str
        The url where it is one of http or https, and the host it names; else empty.
    picture : str
        ``data:`` URL of a thumbnail, or empty.
    """

    row: int
    shard: str
    shard_row: int
    goes: bool = False
    key: str = ""
    caption: str = ""
    caption_length: int = 0
    url: str = ""
    link: str = ""
    host: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Notes:
    """What was looked for in vain, for the page and the summary."""

    rows: int = 0
    pictures: int = 0
    wanted_pictures: bool = False
    unreadable: int = 0
    ambiguous: int = 0


@dataclass(frozen=True)
class Page:
    """All that is known of OUT.

    Attributes
    ----------
    title : str
        Name of the folder.
    out : str
        The folder as it was named, to be typed in a shell.
    manifest : dict
    curve : Curve or None
        None where no cosine is known.
    survey : Survey
    rows : dict of int to Row
        Those that are shown.
    notes : Notes
    sizes : dict
        ``group_size`` and ``dup_count``: (values, counts).
    removed : (shards,) int64
        Rows that go, by shard.
    asked : dict of int to (int, float) or None
        Rows that were asked for: representative and cosine, None without a match.
    """

    title: str
    out: str
    manifest: dict[str, Any]
    curve: Curve | None
    survey: Survey
    rows: dict[int, Row]
    notes: Notes
    sizes: dict[str, tuple[np.ndarray, np.ndarray]]
    removed: np.ndarray
    asked: dict[int, tuple[int, float] | None]


def environment() -> Any:
    """Return where pages find their templates: every value in them is escaped."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "percent": percent, "cosine": cosine}
    return found


def render(page: Page) -> str:
    """Return the page."""
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    script = (TEMPLATES / "report.js").read_text("utf-8")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            generator=GENERATOR,
            pictured=PICTURED,
            policy=policy(styles, script),
            styles=styles,
            script=script,
            page=page,
            counts=page.manifest["counts"],
            settings=page.manifest["settings"],
            curve=curve_view(page),
            charts=chart_view(page),
            bands=[band_view(page, band) for band in page.survey.bands if band.rows],
            below=band_view(page, page.survey.below),
            groups=[group_view(page, group) for group in page.survey.largest],
            copied=[
                (page.rows[int(row)], int(count))
                for row, count in zip(page.survey.copied, page.survey.copies, strict=True)
            ],
            asked=asked_view(page),
            spared=spared_view(page),
            known_keep=page.manifest["settings"]["keep"] in KEEPS,
            shards=shard_view(page),
            manifest=json.dumps(shortened(page.manifest), indent=2, ensure_ascii=False),
        )
    )


def policy(styles: str, script: str) -> str:
    """Return the content security policy: this style, this script, and pictures.

    Pictures may come over http and https, since the reader may ask for one; none is in the page.
    """
    style, code = (
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in (styles, script)
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {code}; "
        "img-src data: https: http:; base-uri 'none'; form-action 'none'"
    )


def number(value: int) -> str:
    """Return a count for reading."""
    return f"{value:,}"


def percent(part: float, whole: float) -> str:
    """Return a share for reading."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def cosine(value: float) -> str:
    """Return a cosine for reading; one below 1 is never shown as 1."""
    if np.isnan(value):
        return "unknown"
    return "1" if value == 1 else f"{min(value, 0.9999):.4f}"


def curve_view(page: Page) -> dict[str, Any] | None:
    """Return the slider's figures and chart."""
    if page.curve is None:
        return None
    counts, curve = page.manifest["counts"], page.curve
    stays = counts["rows"] - curve.removed
    thresholds = np.array([float(text) for text in curve.thresholds])
    scale = charts.staying_scale(np.append(stays, counts["kept"]), counts["rows"])
    said = (
        f"Rows that stay, by threshold: {stays[0]:,} at {curve.thresholds[0]}, rising to "
        f"{stays[-1]:,} at {curve.thresholds[-1]}"
    )
    return {
        "svg": charts.curve_chart(thresholds, stays, counts["rows"], counts["kept"], said),
        "lines": list(
            zip(
                curve.thresholds,
                curve.removed.tolist(),
                stays.tolist(),
                curve.groups.tolist(),
                strict=True,
            )
        ),
        "data": {
            "thresholds": curve.thresholds,
            "removed": curve.removed.tolist(),
            "groups": curve.groups.tolist(),
            "rows": counts["rows"],
            "y": [round(scale.y(value), 1) for value in stays.tolist()],
        },
    }


def chart_view(page: Page) -> dict[str, str]:
    """Return the histograms."""
    survey, (sizes, groups) = page.survey, page.sizes["group_size"]
    copies, rows = page.sizes["dup_count"]
    known = int(survey.similarities.sum())
    return {
        "similarity": charts.bar_chart(
            charts.similarity_bars(survey.edges, survey.similarities),
            "cosine with the row that stays",
            f"Removed rows by cosine with the row that stays for them: {known:,} rows, "
            f"{int(survey.similarities[-1]):,} of them exactly 1",
        ),
        "sizes": charts.bar_chart(
            charts.size_bars(sizes, groups),
            "rows in the group",
            f"Groups by number of rows: {int(groups.sum()):,} groups, from 2 to "
            f"{int(sizes.max(initial=2)):,} rows",
        ),
        "copies": charts.bar_chart(
            charts.size_bars(copies, rows),
            "rows removed for it (dup_count)",
            f"Rows that stay by dup_count: {int(rows.sum()):,} stand for others, at most for "
            f"{int(copies.max(initial=0)):,}",
        ),
    }


def band_view(page: Page, band: Band) -> dict[str, Any]:
    """Return a band of similarities with its pairs: (removed row, row that stays, cosine)."""
    return {"low": band.low, "high": band.high, "rows": band.rows, "pairs": pairs(page, band.shown)}


def pairs(page: Page, shown: Members) -> list[tuple[Row, Row | int, float]]:
    """Return removed rows, each with its representative (a reference's: its row) and the cosine."""
    return [
        (page.rows[int(row)], page.rows.get(int(other), int(~other)), float(similarity))
        for row, other, similarity in zip(
            shown.row, shown.representative, shown.similarity, strict=True
        )
    ]


def asked_view(page: Page) -> list[tuple[Row, Row | int | None, float]]:
    """Return rows that were asked for, with what stands for them; None where they stay."""
    shown: list[tuple[Row, Row | int | None, float]] = []
    for row, partner in page.asked.items():
        other, similarity = partner or (row, np.nan)
        gone = page.rows[row].goes
        known = page.rows.get(other, int(~other)) if gone else None
        shown.append((page.rows[row], known, similarity))
    return shown


def group_view(page: Page, group: Group) -> dict[str, Any]:
    """Return a group with the rows that are shown of it, each with its cosine."""
    shown = group.shown
    return {
        "size": group.size,
        "removed": group.removed,
        "lowest": group.lowest,
        "label": int(shown.group[0]),
        "rows": [
            (page.rows[int(row)], float(similarity))
            for row, similarity in zip(shown.row, shown.similarity, strict=True)
        ],
    }


def spared_view(page: Page) -> list[tuple[Row, Row]]:
    """Return rows that stay, each with the one row that components would keep of its group."""
    survey = page.survey
    return [
        (page.rows[int(row)], page.rows[int(other)])
        for row, other in zip(survey.spared.row, survey.spared_by, strict=True)
    ]


def shard_view(page: Page) -> dict[str, Any]:
    """Return a line for each shard; of very many those that lose the largest share."""
    lines = [
        (shard["name"], shard["rows"], int(gone), int(foreign))
        for shard, gone, foreign in zip(
            page.manifest["shards"], page.removed, page.survey.foreign, strict=True
        )
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
