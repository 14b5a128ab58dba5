"""``snip report``: reads a finished OUT and writes one page of HTML about it.

The page works from disk and offline. Captions, keys and urls are strangers' texts: the template
escapes them, and only http and https become links. A remote picture is fetched only when the reader
asks for it. Rows, groups and pairs are JSON in the page, and ``templates/browse.js`` shows them. To
add a section: its values in `make_page`, its HTML in ``templates/report.html.j2``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Report
from snipdedup.deduplication import read_out
from snipdedup.deduplication.inputs import KIND, named_paths
from snipdedup.deduplication.second_features import recorded_seconds
from snipdedup.errors import SnipError
from snipdedup.features.origin import Origin, origin_of
from snipdedup.inspection import display, embedded, thumbnails
from snipdedup.inspection.display import is_number
from snipdedup.inspection.page_data import Row, ordered_rows, page_data
from snipdedup.inspection.page_data import known as known_cosine
from snipdedup.metadata.find_keys import find_run_rows
from snipdedup.metadata.gather import RowTexts, open_row_texts
from snipdedup.metadata.tables import stream_parquet
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import as_written, read_manifest, refuse_output_file

NAME = "report.html"
GENERATOR = '<meta name="generator" content="snip report">'
PICTURED = '<meta name="snip-pictures"'  # stands in a page that has some
HEAD = 2048  # bytes in which a report says that it is one
SCRIPTS = ("report.js", "browse.js")
PICTURES = 1000  # rows with pictures in a page, at the most
SHARDS = 400  # lines of the table at the most
LISTED = 6  # entries of the manifest's lists as shown


@dataclass(frozen=True)
class PictureCounts:
    """Rows shown, pictures found of them, whether any were wanted, and what could not be used."""

    rows: int
    found: int = 0
    wanted: bool = False
    unreadable: int = 0  # files that are no pictures, or too large
    ambiguous: int = 0  # keys with several pictures
    changed: frozenset[int] = frozenset()  # rows whose file is not the one that was embedded


@dataclass(frozen=True)
class ReportResult:
    """The page that ``snip report`` wrote, its size in bytes, and the pictures in it."""

    path: Path
    size: int
    pictures: PictureCounts

    def __str__(self) -> str:
        counts = self.pictures
        lines = [f"written to {self.path} ({self.size / 1e6:.1f} MB)"]
        if counts.wanted:
            lines.append(f"pictures of {counts.found:,} of the {counts.rows:,} rows shown")
        if counts.unreadable:
            lines.append(f"  {counts.unreadable:,} files are no pictures, or too large")
        if counts.changed:
            lines.append(f"  {len(counts.changed):,} pictures changed since they were embedded")
        if counts.ambiguous:
            lines.append(
                f"  {counts.ambiguous:,} keys have several pictures; none of them is shown"
            )
        return "\n".join(lines)


def run(options: Report) -> ReportResult:
    """Run ``snip report``."""
    display.require("jinja2", "a report")
    asked = options.images is not None or options.image_column is not None
    if asked:
        display.require("PIL", "a page with pictures (--images, --image_column)")
    out = Path(options.out).expanduser()
    with as_written(out):
        manifest = read_manifest(out, KIND)
        target = out / NAME if options.html is None else Path(options.html).expanduser()
        texts = open_row_texts(out, manifest, options.metadata)
        origin = None if asked else known_pictures(manifest)
        images = [] if options.images is None else [Path(options.images).expanduser()]
        refuse_output_file(target, [*texts.inputs(), *images, *named_paths(manifest)])
        if not options.overwrite:
            check_target(target, asked or origin is not None)
        text, pictures = make_page(out, manifest, texts, options, origin)
        with replacing(target) as part:
            part.write_text(text, encoding="utf-8")
    return ReportResult(target, len(text.encode()), pictures)


def known_pictures(manifest: dict[str, Any]) -> Origin | None:
    """Return the origin of a run's features where ``snip embed`` made them of pictures."""
    if importlib.util.find_spec("PIL") is None:
        return None
    with suppress(SnipError):  # damaged, or in a store that cannot be reached now
        return origin_of(manifest["settings"]["features"])
    return None


def check_target(target: Path, pictured: bool) -> None:
    """Refuse to replace a file that is no report, or a page with pictures by one without."""
    if not target.is_file():
        return
    with target.open("rb") as file:
        head = file.read(HEAD)
    if GENERATOR.encode() not in head:
        raise SnipError(
            f"{target} exists and is not a report; choose another --html, or --overwrite it"
        )
    if PICTURED.encode() in head and not pictured:
        raise SnipError(
            f"{target} has pictures, the new page would have none; give --images again, another "
            "--html, or --overwrite it"
        )


def make_page(
    out: Path,
    manifest: dict[str, Any],
    texts: RowTexts,
    options: Report,
    origin: Origin | None,
) -> tuple[str, PictureCounts]:
    """Read OUT; return the page, and the pictures in it; those of ``origin`` are found by it."""
    settings, counts, shards = manifest["settings"], manifest["counts"], manifest["shards"]
    threshold, keep = settings["threshold"], settings["keep"]
    offsets, groups = display.shard_offsets(shards), out / "groups.parquet"
    survey = read_out.survey_groups(groups, settings, offsets, options.seed, options.groups)
    curve = None
    if manifest["verified"] and settings.get("grouping"):  # semdedup knows few of the pairs
        levels = manifest["thresholds"]
        steps = [level["threshold"] for level in levels]
        known = read_out.read_curve(out / "forest.parquet", int(offsets[-1]), threshold, steps)
        curve = curve_section(known, counts, levels)
    named = options.rows is not None
    asked = sorted(find_run_rows(out, manifest, texts, options.rows)) if named else []
    partners = read_out.read_partners(groups, np.array(asked, np.int64))
    shown = shown_rows(survey, [*asked, *(other for other, _ in partners.values())])
    found = [(row, *partners.get(row, (row, np.nan))) for row in asked]
    is_dup = np.load(out / "is_dup.npy", mmap_mode="r")
    rows, counted = read_rows(out, manifest, texts, options, origin, shown, is_dup)
    lists = [[a, b, known_cosine(cosine)] for a, b, cosine in found]
    names = [str(shard["name"]) for shard in shards]
    data = page_data(rows, survey, lists, names, keep in read_out.KEEPS)
    page = display.render_page(
        "report.html.j2",
        "".join((display.TEMPLATES / name).read_text("utf-8") for name in SCRIPTS),
        generator=GENERATOR,
        pictured=PICTURED,
        title=out.resolve().name,
        out=shlex.quote(str(options.out)),
        run=manifest,
        survey=survey,
        seconds=[(short_name(one["name"]), one["threshold"]) for one in recorded_seconds(manifest)],
        pictures=counted,
        curve=curve,
        charts=histograms(survey, out / "histogram.parquet"),
        data=data,
        asked=asked,
        known_keep=keep in read_out.KEEPS,
        shards=shard_section(shards, offsets, is_dup, survey.foreign.tolist()),
        manifest=json.dumps(shortened(manifest), indent=2, ensure_ascii=False),
    )
    return page, counted


def read_rows(
    out: Path,
    manifest: dict[str, Any],
    texts: RowTexts,
    options: Report,
    origin: Origin | None,
    chosen: tuple[np.ndarray, np.ndarray],
    is_dup: np.ndarray,
) -> tuple[dict[int, Row], PictureCounts]:
    """Return what the page shows of rows, by row; and how many have pictures.

    ``chosen`` are all rows, and those with pictures, (n,) int64 each; see `shown_rows`.
    """
    shown, pictured = chosen
    groups = out / "groups.parquet"
    keys, also = read_out.read_keys(groups, shown), read_out.read_also(groups, shown)
    pictures, counted = find_pictures(pictured, keys, texts, options, origin)
    counted = dataclasses.replace(counted, rows=len(shown))
    names = [short_name(second["name"]) for second in recorded_seconds(manifest)]
    rows = {
        row: Row(
            row,
            **place,
            key=keys.get(row),
            removed=bool(is_dup[row]),
            picture=pictures.get(row),
            changed=row in counted.changed,
            also=list(zip(names, also.get(row, ()), strict=False)),
        )
        for row, place in display.places_of(manifest["shards"], shown.tolist()).items()
    }
    display.fill_texts(list(rows.values()), texts, "url", "caption")
    fill_facts(rows, texts)
    return rows, counted


def shown_rows(survey: read_out.Survey, more: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows that the page shows, and those of them whose pictures it has, ascending.

    The rows ``more`` come first; rows of references are none of these.
    """
    rows = np.concatenate(list(ordered_rows(survey, more)))
    rows = rows[rows >= 0].astype(np.int64)
    every, first = np.unique(rows, return_index=True)
    return every, np.sort(rows[np.sort(first)[:PICTURES]])


def find_pictures(
    shown: np.ndarray,
    keys: dict[int, str],
    texts: RowTexts,
    options: Report,
    origin: Origin | None,
) -> tuple[dict[int, str], PictureCounts]:
    """Return thumbnails by row, and how many there are."""
    if options.image_column is not None:
        if texts.metadata is None:
            raise SnipError("--image_column names a column of the metadata: give --metadata too")
        names = texts.read(texts.find(options.image_column), shown)
        found = thumbnails.by_path(names.values(), options.images)
    elif options.images is not None:
        if not keys and len(shown):
            raise SnipError(
                "pictures are found by key, and groups.parquet has none: run snip dedup with "
                "--metadata (and --key), or give --image_column"
            )
        names = {row: keys[row] for row in shown.tolist() if row in keys}
        found = thumbnails.by_key(options.images, names.values())
    elif origin is not None:
        names = {row: str(row) for row in shown.tolist()}
        found = embedded.by_place(origin, texts, shown)
    else:
        return {}, PictureCounts(len(shown))
    pictures = {row: found.pictures[name] for row, name in names.items() if name in found.pictures}
    return pictures, PictureCounts(
        len(shown), len(pictures), True, len(found.unreadable), len(found.ambiguous),
        frozenset(map(int, found.changed)),
    )  # fmt: skip


def short_name(name: str) -> str:
    """Return the end of a path or URL that tells it from others: its last folder or file."""
    parts = [part for part in str(name).split("/") if part]
    own = parts[-2:] if parts[-1:] == ["img_emb"] else parts[-1:]
    return "/".join(own) or str(name)


def fill_facts(rows: dict[int, Row], texts: RowTexts) -> None:
    """Set what the metadata tells of the pictures: width × height, size of the file, time."""
    known = {
        name: texts.read(texts.find(wanted=(name,)), np.array(list(rows), np.int64))
        for name in ("width", "height", "bytes", "exif_time")
    }
    for row, shown in rows.items():
        width, height, size, time = (values.get(row, "") for values in known.values())
        facts = [f"{width} × {height}"] if is_number(width) and is_number(height) else []
        facts += [size_text(int(size))] if is_number(size) else []
        shown.facts = " · ".join([*facts, *([time.replace("T", " ")] if time else [])])


def size_text(size: int) -> str:
    """Return a number of bytes for reading."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def curve_section(
    curve: read_out.Curve, counts: dict[str, int], levels: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the slider's figures and chart, of the run's grouping; ``levels`` are its table's.

    Star is counted at these alone. Between them the rows that it spares of those that components
    remove are interpolated. Older runs know components only.
    """
    thresholds, components = np.array(curve.thresholds, np.float64), curve.removed
    removed, estimated = components, np.zeros(len(components), bool)
    star = bool(levels) and "components" in levels[0]
    if star:
        at, now, then = (
            np.array([level[name] for level in levels], np.float64)
            for name in ("threshold", "removed", "components")
        )
        if at[-1] < 1 and "reference_rows" not in counts:  # at 1, pairs hardly ever chain
            at, now, then = (np.append(part, end) for part, end in ((at, 1), (now, 0), (then, 0)))
        removed = np.rint(components + np.interp(thresholds, at, now - then)).astype(np.int64)
        sure = [level["threshold"] for level in levels if not level["estimated"]]
        estimated = ~np.isin(np.round(thresholds, 9), np.round(sure, 9))
    kept = counts["rows"] - removed
    chart = display.curve_chart(thresholds, kept, counts["rows"], counts["kept"])
    columns = removed, kept, curve.groups, estimated, components
    data = {
        "thresholds": curve.thresholds,
        "removed": removed.tolist(),
        "groups": curve.groups.tolist(),
        "estimated": estimated.tolist(),
        "rows": counts["rows"],
        "y": [round(y, 1) for y in chart["y"]],
    }
    lines = list(zip(curve.thresholds, *(column.tolist() for column in columns), strict=True))
    return {"chart": chart, "lines": lines, "data": data, "star": star}


def histograms(survey: read_out.Survey, path: Path) -> dict[str, Any]:
    """Return the charts of cosines, and of group sizes and dup_count from ``histogram.parquet``."""
    table = stream_parquet(path).read()
    of, value, count = (table[name].to_numpy() for name in ("of", "value", "count"))
    in_groups, stand = ((of == name) & (value > 0) for name in ("group_size", "dup_count"))
    similarity = display.similarity_bars(survey.edges, survey.similarities)
    return {
        "similarity": display.bar_chart(similarity),
        "sizes": display.bar_chart(display.size_bars(value[in_groups], count[in_groups])),
        "largest": int(value[in_groups].max(initial=2)),
        "copies": display.bar_chart(display.size_bars(value[stand], count[stand])),
        "most": int(value[stand].max(initial=0)),
    }


def shard_section(
    shards: list[dict[str, Any]], offsets: np.ndarray, is_dup: np.ndarray, foreign: list[int]
) -> dict[str, Any]:
    """Return a line for each shard; of very many those that lose the largest share."""
    removed = [int(np.count_nonzero(is_dup[a:b])) for a, b in pairwise(offsets)]
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
