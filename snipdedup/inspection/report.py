"""``snip report``: one page of HTML about a finished OUT, without anything from elsewhere.

The page works from disk and offline. Captions, keys and urls are strangers' texts: the template
escapes them, only http and https become links, and the page's own policy lets nothing else run or
load. A picture that lies elsewhere is fetched only when the reader asks for it.
"""

from __future__ import annotations

import re
import shlex
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
from snipdedup.inspection.report_page import GENERATOR, PICTURED, Notes, Page, Row, render
from snipdedup.metadata.tables import open_parquet
from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts, open_texts
from snipdedup.storage import atomic, out_folder
from snipdedup.storage.manifest import as_written, read_manifest

NAME = "report.html"
HEAD = 2048  # bytes in which a report says that it is one
CAPTION, KEY, URL = 240, 80, 2048  # characters shown, or linked
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # control characters, line breaks among them


def run(options: Report) -> str:
    """Run ``snip report`` and return where the page is."""
    require_jinja()
    if options.images is not None or options.image_column is not None:
        thumbnails.require_pillow()
    out = Path(options.out).expanduser()
    with as_written(out):
        return write_report(out, options)


def write_report(out: Path, options: Report) -> str:
    """Write the page of a finished OUT; return where it is."""
    manifest = read_manifest(out, KIND)
    target = out / NAME if options.html is None else Path(options.html).expanduser()
    texts = open_texts(out, manifest, options.metadata)
    read = inputs_of(texts, options.images)
    out_folder.refuse_output_file(target, [*read, *named_paths(manifest)])
    check_target(target, options.overwrite)
    if options.images is None and options.image_column is None:
        keep_pictures(target, options.overwrite)
    page = survey_out(out, manifest, texts, options)
    text = render(page)
    with atomic.replacing(target) as part:
        part.write_text(text, encoding="utf-8")
    return summary(page, target, len(text.encode()))


def inputs_of(texts: RowTexts, images: str | None) -> list[Path]:
    """Return the files and folders that are read, besides OUT."""
    inputs = [] if texts.metadata is None else texts.metadata.inputs()
    return inputs if images is None else [*inputs, Path(images).expanduser()]


def require_jinja() -> None:
    """Refuse where jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SnipError("a report needs jinja2: pip install 'snipdedup-toolkit[report]'") from None


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace a file that is not an earlier report."""
    if not target.is_file() or overwrite:
        return
    with target.open("rb") as file:
        if GENERATOR.encode() not in file.read(HEAD):
            raise SnipError(
                f"{target} exists and is not a report; choose another --html, or --overwrite it"
            )


def keep_pictures(target: Path, overwrite: bool) -> None:
    """Refuse to replace a page with pictures by one without."""
    if not target.is_file() or overwrite:
        return
    with target.open("rb") as file:
        if PICTURED.encode() in file.read(HEAD):
            raise SnipError(
                f"{target} has pictures, the new page would have none; give --images again, "
                "another --html, or --overwrite it"
            )


def survey_out(out: Path, manifest: dict[str, Any], texts: RowTexts, options: Report) -> Page:
    """Read OUT into what the page shows."""
    settings, shards = manifest["settings"], manifest["shards"]
    offsets = offsets_of(shards)
    told = Run(settings["threshold"], settings["keep"], settings["seed"] or 0, offsets)
    curve = None
    if manifest["verified"] and settings.get("grouping"):  # semdedup knows few of the pairs
        curve = read_curve(out / "forest.parquet", int(offsets[-1]), told.threshold)
    survey = survey_groups(out / "groups.parquet", told, options.seed)
    asked = asked_rows(options, int(offsets[-1]))
    partners = read_partners(out / "groups.parquet", asked)
    others = [other for other, _ in partners.values() if other >= 0]
    wanted = np.union1d(shown_rows(survey), [*asked, *others]).astype(np.int64)
    keys = read_keys(out / "groups.parquet", wanted)
    is_dup = np.load(out / "is_dup.npy", mmap_mode="r")
    pictures, notes = find_pictures(wanted, keys, texts, options)
    rows = describe_rows(wanted, shards, is_dup, keys, texts, pictures)
    removed = [np.count_nonzero(is_dup[a:b]) for a, b in pairwise(offsets)]
    return Page(
        title=out.resolve().name,
        out=shlex.quote(str(options.out)),
        manifest=manifest,
        curve=curve,
        survey=survey,
        rows=rows,
        notes=notes,
        sizes=read_sizes(out / "histogram.parquet"),
        removed=np.array(removed, np.int64),
        asked={int(row): partners.get(int(row)) for row in asked},
    )


def asked_rows(options: Report, rows: int) -> np.ndarray:
    """Return the rows of ``--rows``, ascending; refuse one that is not there."""
    asked = [] if options.rows is None else whole_numbers("rows", options.rows, 2**48, least=0)
    if asked and asked[-1] >= rows:
        raise SnipError(f"--rows names row {asked[-1]:,}, the set has rows 0 to {rows - 1:,}")
    return np.array(asked, np.int64)


def offsets_of(shards: list[dict[str, Any]]) -> np.ndarray:
    """Return the first row of each shard, then the number of rows."""
    return np.cumsum([0, *(shard["rows"] for shard in shards)], dtype=np.int64)


def read_sizes(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (values, counts) of ``group_size`` and ``dup_count``; 0 is left out."""
    table = open_parquet(path).read()
    of = np.array(table["of"].to_pylist(), object)
    value, count = table["value"].to_numpy(), table["count"].to_numpy()
    chosen = {name: (of == name) & (value > 0) for name in ("group_size", "dup_count")}
    return {name: (value[mask], count[mask]) for name, mask in chosen.items()}


def shown_rows(survey: Survey) -> np.ndarray:
    """Return all rows that the page shows, ascending."""
    samples = [band.shown for band in (*survey.bands, survey.below)]
    samples += [group.shown for group in survey.largest] + [survey.spared]
    parts = [rows for sample in samples for rows in (sample.row, sample.representative)]
    found = np.unique(np.concatenate([*parts, survey.copied, survey.spared_by]))
    return found[found >= 0]


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
    offsets, rows = offsets_of(shards), {}
    for row in wanted.tolist():
        shard = int(np.searchsorted(offsets, row, "right")) - 1
        caption, url = captions.get(row, ""), urls.get(row, "")
        link = safe_link(url)
        rows[row] = Row(
            row=row,
            shard=shards[shard]["name"],
            shard_row=row - int(offsets[shard]),
            goes=bool(is_dup[row]),
            key=cut(keys.get(row, ""), KEY),
            caption=cut(caption, CAPTION),
            caption_length=len(caption),
            url=cut(url, CAPTION),
            link=link,
            host=(urlsplit(link).hostname or "") if link else "",
            picture=pictures.get(row, ""),
        )
    return rows


def find_pictures(
    wanted: np.ndarray, keys: dict[int, str], texts: RowTexts, options: Report
) -> tuple[dict[int, str], Notes]:
    """Return thumbnails by row."""
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
        return {}, Notes(len(wanted))
    pictures = {row: found.pictures[name] for row, name in names.items() if name in found.pictures}
    return pictures, Notes(
        len(wanted), len(pictures), True, len(found.unreadable), len(found.ambiguous)
    )


def cut(text: str, most: int) -> str:
    """Return a stranger's text on one line, and not too long."""
    text = UNSEEN.sub(" ", text[: 4 * most]).strip()
    return text if len(text) <= most else text[:most].rstrip() + "…"


def safe_link(url: str) -> str:
    """Return a url that may be followed: http or https with a host, and nothing odd in it."""
    if len(url) > URL or UNSEEN.search(url) or any(c.isspace() or c in "\\\"'<>`" for c in url):
        return ""
    try:
        parts = urlsplit(url)
        usual = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return ""
    return url if usual else ""


def summary(page: Page, target: Path, size: int) -> str:
    """Return what the command prints."""
    notes = page.notes
    lines = [f"written to {target} ({size / 1e6:.1f} MB)"]
    if notes.wanted_pictures:
        lines.append(f"pictures of {notes.pictures:,} of the {notes.rows:,} rows shown")
        if notes.unreadable:
            lines.append(f"  {notes.unreadable:,} files are no pictures, or too large")
        if notes.ambiguous:
            lines.append(f"  {notes.ambiguous:,} keys have several pictures; none of them is shown")
    return "\n".join(lines)
