"""``snip report``: reads a finished OUT and writes one page of HTML about it.

The page works from disk and offline. Captions, keys and urls are strangers' texts: the template
escapes them, only http and https become links, and the page's own policy lets nothing else run or
load. A remote picture is fetched only when the reader asks for it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from snipdedup.config import Report, whole_numbers
from snipdedup.deduplication.inputs import named_paths
from snipdedup.deduplication.out_reader import (
    Run,
    Survey,
    read_curve,
    read_keys,
    read_partners,
    survey_groups,
)
from snipdedup.deduplication.references import KIND
from snipdedup.errors import SnipError
from snipdedup.inspection import thumbnails
from snipdedup.inspection.display import page_text, place_of, safe_link, shard_offsets
from snipdedup.inspection.report_page import (
    GENERATOR,
    PICTURED,
    PictureCounts,
    Row,
    render,
    require_jinja,
)
from snipdedup.metadata.tables import stream_parquet
from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts, open_row_texts
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import as_written, read_manifest, refuse_output_file

NAME = "report.html"
HEAD = 2048  # bytes in which a report says that it is one
CAPTION, KEY = 240, 80  # characters shown


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
            if counts.ambiguous:
                lines.append(
                    f"  {counts.ambiguous:,} keys have several pictures; none of them is shown"
                )
        return "\n".join(lines)


def run(options: Report) -> ReportResult:
    """Run ``snip report``."""
    require_jinja("a report")
    pictured = options.images is not None or options.image_column is not None
    if pictured:
        thumbnails.require_pillow()
    out = Path(options.out).expanduser()
    with as_written(out):
        manifest = read_manifest(out, KIND)
        target = out / NAME if options.html is None else Path(options.html).expanduser()
        texts = open_row_texts(out, manifest, options.metadata)
        read = [] if texts.metadata is None else texts.metadata.inputs()
        if options.images is not None:
            read = [*read, Path(options.images).expanduser()]
        refuse_output_file(target, [*read, *named_paths(manifest)])
        if not options.overwrite:
            check_target(target, pictured)
        text, pictures = make_page(out, manifest, texts, options)
        with replacing(target) as part:
            part.write_text(text, encoding="utf-8")
    return ReportResult(target, len(text.encode()), pictures)


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
    out: Path, manifest: dict[str, Any], texts: RowTexts, options: Report
) -> tuple[str, PictureCounts]:
    """Read OUT; return the page, and the pictures in it."""
    settings, offsets = manifest["settings"], shard_offsets(manifest["shards"])
    rows, groups = int(offsets[-1]), out / "groups.parquet"
    survey = survey_groups(
        groups,
        Run(settings["threshold"], settings["keep"], settings["seed"] or 0, offsets),
        options.seed,
    )
    curve = None
    if manifest["verified"] and settings.get("grouping"):  # semdedup knows few of the pairs
        curve = read_curve(out / "forest.parquet", rows, settings["threshold"])
    asked = [] if options.rows is None else whole_numbers("rows", options.rows, 2**48, least=0)
    if asked and asked[-1] >= rows:
        raise SnipError(f"--rows names row {asked[-1]:,}, the set has rows 0 to {rows - 1:,}")
    partners = read_partners(groups, np.array(asked, np.int64))
    others = [other for other, _ in partners.values() if other >= 0]
    shown = np.union1d(shown_rows(survey), [*asked, *others]).astype(np.int64)
    keys = read_keys(groups, shown)
    is_dup = np.load(out / "is_dup.npy", mmap_mode="r")
    pictures, counts = find_pictures(shown, keys, texts, options)
    page = render(
        out.resolve().name,
        shlex.quote(str(options.out)),
        manifest,
        curve=curve,
        survey=survey,
        rows=describe_rows(shown, manifest["shards"], is_dup, keys, texts, pictures),
        pictures=counts,
        sizes=read_sizes(out / "histogram.parquet"),
        removed=[int(np.count_nonzero(is_dup[a:b])) for a, b in pairwise(offsets)],
        asked={row: partners.get(row) for row in asked},
    )
    return page, counts


def read_sizes(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (values, counts) of ``group_size`` and ``dup_count``; 0 is left out."""
    table = stream_parquet(path).read()
    of = np.array(table["of"].to_pylist(), object)
    value, count = table["value"].to_numpy(), table["count"].to_numpy()
    chosen = {name: (of == name) & (value > 0) for name in ("group_size", "dup_count")}
    return {name: (value[mask], count[mask]) for name, mask in chosen.items()}


def shown_rows(survey: Survey) -> np.ndarray:
    """Return all rows that the page shows, ascending."""
    samples = [band.shown for band in (*survey.bands, survey.below)]
    samples += [group.shown for group in survey.largest] + [survey.spared]
    parts = [rows for sample in samples for rows in (sample.row, sample.representative)]
    rows = np.unique(np.concatenate([*parts, survey.copied, survey.spared_by]))
    return rows[rows >= 0]


def describe_rows(
    wanted: np.ndarray,
    shards: list[dict[str, Any]],
    is_dup: np.ndarray,
    keys: dict[int, str],
    texts: RowTexts,
    pictures: dict[int, str],
) -> dict[int, Row]:
    """Return what is known of the rows that are shown."""
    captions = texts.read(texts.find(wanted=CAPTIONS), wanted)
    urls = texts.read(texts.find(wanted=URLS), wanted)
    offsets, rows = shard_offsets(shards), {}
    for row in wanted.tolist():
        caption, url = captions.get(row, ""), urls.get(row, "")
        link = safe_link(url)
        rows[row] = Row(
            row=row,
            **place_of(shards, offsets, row),
            removed=bool(is_dup[row]),
            key=page_text(keys.get(row, ""), KEY),
            caption=page_text(caption, CAPTION),
            caption_length=len(caption),
            url=page_text(url, CAPTION),
            link=link,
            host=(urlsplit(link).hostname or "") if link else "",
            picture=pictures.get(row, ""),
        )
    return rows


def find_pictures(
    wanted: np.ndarray, keys: dict[int, str], texts: RowTexts, options: Report
) -> tuple[dict[int, str], PictureCounts]:
    """Return thumbnails by row, and how many there are."""
    if options.image_column is not None:
        if texts.metadata is None:
            raise SnipError("--image_column names a column of the metadata: give --metadata too")
        names = texts.read(texts.find(options.image_column), wanted)
        found = thumbnails.by_path(names.values(), options.images)
    elif options.images is not None:
        names = keys
        if not keys and len(wanted):
            raise SnipError(
                "pictures are found by key, and groups.parquet has none: run snip dedup with "
                "--metadata (and --key), or give --image_column"
            )
        found = thumbnails.by_key(options.images, keys.values())
    else:
        return {}, PictureCounts(len(wanted))
    pictures = {row: found.pictures[name] for row, name in names.items() if name in found.pictures}
    return pictures, PictureCounts(
        len(wanted), len(pictures), True, len(found.unreadable), len(found.ambiguous)
    )
