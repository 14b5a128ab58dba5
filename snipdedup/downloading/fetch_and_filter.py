"""Fetch the files of a set several at a time; filter each by the mask as it arrives.

A file is fetched to its place, or below ``arrived/`` if it has to be filtered. A done file is
written when it is fetched, and another one when its outputs are complete, so that a stopped run
fetches and filters nothing twice, and uses no file that was damaged since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file
from snipdedup.errors import SnipError
from snipdedup.metadata.kept_rows import FILES, feature_rows, write_kept, write_kept_features
from snipdedup.metadata.masks import FileSizes, Mask, check_sizes
from snipdedup.metadata.tables import Metadata, open_table
from snipdedup.storage import atomic
from snipdedup.storage.listing import FEATURES, METADATA

ARRIVED = "arrived"  # below the work folder: fetched, not yet filtered
FETCHED = "fetched"  # below the work folder: a done file for each file that was fetched
DONE_FILES = "done"  # below the work folder: a done file for each file of metadata


@dataclass(frozen=True)
class DownloadItem:
    """One file of metadata to fetch, its number in the set if known, and its features."""

    table: SourceFile
    number: int | None
    features: SourceFile | None = None

    def done_file(self, work: Path) -> Path:
        """Return the done file that is written when the outputs of this item are complete."""
        return work / DONE_FILES / f"{self.table.name}.json"

    def place(self, folder: Path, suffix: str | None = None) -> list[tuple[SourceFile, Path]]:
        """Return its files, and where they lie in a folder that is laid out as OUT is."""
        name = self.table.name if suffix is None else Path(self.table.name).stem + suffix
        if self.features is None:
            return [(self.table, folder / name)]
        features = folder / FEATURES / self.features.name
        return [(self.table, folder / METADATA / name), (self.features, features)]


@dataclass(frozen=True)
class DownloadPlan:
    """What a run fetches, and the row of the mask at which it begins."""

    items: list[DownloadItem]
    mask: Mask | None
    first_row: int

    def outputs(self, item: DownloadItem, work: Path) -> list[Path]:
        """Return where the files of an item lie when they are complete."""
        suffix = None if self.mask is None else ".parquet"
        return [path for _, path in item.place(work / FILES, suffix)]


def fetch_items(plan: DownloadPlan, work: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Fetch files several at a time, filter them in order; yield their entries of the manifest."""
    done = {item.table.name: read_done(item, plan, work) for item in plan.items}
    pending = [item for item in plan.items if not done[item.table.name]]
    arrived = work / (FILES if plan.mask is None else ARRIVED)
    total = sum(file.size or 0 for item in pending for file, _ in item.place(arrived))
    row = plan.first_row
    with progress.bar(total, "download", "B") as bar:
        monitor = Monitor(bar)
        fetched = monitor.map(lambda item: fetch_item(item, arrived, work, monitor), pending, jobs)
        with closing(fetched):
            for item in plan.items:
                about = done[item.table.name]
                if not about:
                    sizes = next(fetched)
                    paths = [path for _, path in item.place(arrived)]
                    about = {**sizes, **check_item(item, paths), "first_row": row}
                    if plan.mask is not None:
                        about |= filter_item(item, paths, plan, work, row)
                    outputs = plan.outputs(item, work)
                    named = {path.relative_to(work / FILES).as_posix(): path for path in outputs}
                    atomic.write_done_file(item.done_file(work), named, about)
                    for path in set(paths) - set(outputs):
                        path.unlink()
                    for path in paths:
                        fetched_file(path, work).unlink()
                yield about
                row += about["rows"]


def read_done(item: DownloadItem, plan: DownloadPlan, work: Path) -> dict[str, Any]:
    """Return the entry of a file that a stopped run completed, else nothing."""
    done_file = item.done_file(work)
    if not done_file.is_file():
        return {}
    if atomic.is_done(done_file, work / FILES):
        about = atomic.load_json(done_file)
        return {name: value for name, value in about.items() if name not in ("files", "seal")}
    for path in plan.outputs(item, work):  # damaged since then
        path.unlink(missing_ok=True)
    return {}


def fetched_file(path: Path, work: Path) -> Path:
    """Return the done file of one file that was fetched to ``path``, below the work folder."""
    return work / FETCHED / f"{path.relative_to(work).as_posix()}.json"


def fetch_item(item: DownloadItem, folder: Path, work: Path, monitor: Monitor) -> dict[str, Any]:
    """Fetch what is missing of one file and its features; return size and etag of the file."""
    described = []
    for file, path in item.place(folder):
        done_file = fetched_file(path, work)
        if atomic.is_done(done_file, path.parent):  # by a run that was stopped
            about = atomic.load_json(done_file)
            monitor.report(path, about["size"])
        else:
            path.unlink(missing_ok=True)
            about = fetch_file(file, path, monitor)
            atomic.write_done_file(done_file, [path], about)
        described.append({"size": about["size"], "etag": about["etag"]})
    return described[0]


def check_item(item: DownloadItem, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the manifest's entry of one file and its features; refuse what is not such files."""
    table, *features = paths
    rows = count_arrived(item.table, table, "metadata")
    about = {"name": table.name, "source": item.table.shown, "number": item.number}
    about |= {"rows": rows, "kept": rows}
    if item.features is None:
        return about
    found = count_arrived(item.features, features[0], "features")
    if found != rows:
        where = f"{item.features.shown} has {found:,} rows, its metadata {item.table.shown}"
        raise SnipError(f"{where} {rows:,}; they do not belong together")
    return {**about, "features": features[0].name, "features_source": item.features.shown}


def count_arrived(file: SourceFile, path: Path, what: str) -> int:
    """Return the rows of a file that was fetched; remove one that is not what it should be."""
    try:
        return open_table(path).rows if what == "metadata" else feature_rows(path)
    except SnipError as error:
        path.unlink(missing_ok=True)
        raise SnipError(f"{file.shown}: expected {what}, found another file: {error}") from error


def filter_item(
    item: DownloadItem, paths: Sequence[Path], plan: DownloadPlan, work: Path, row: int
) -> dict[str, Any]:
    """Write the kept rows of one file, whose first row is ``row`` of the set, and its features."""
    table = open_table(paths[0])
    keep = rows_to_keep(item, table.rows, plan, row)
    outputs = plan.outputs(item, work)
    write_kept(Metadata([table]), ~keep, outputs[0].parent)
    for path, output in zip(paths[1:], outputs[1:], strict=True):
        write_kept_features(path, output, ~keep)
    return {"name": outputs[0].name, "kept": int(np.count_nonzero(keep))}


def rows_to_keep(item: DownloadItem, rows: int, plan: DownloadPlan, row: int) -> np.ndarray:
    """Return which rows of a file are kept, (rows,) bool; refuse a file that is not the mask's."""
    file, mask = item.table, plan.mask
    if mask is None:
        return np.ones(rows, bool)
    if item.number is not None and mask.sizes is not None and item.number < len(mask.sizes):
        check_sizes(FileSizes([file.shown], [rows]), mask.sizes, item.number)
    if item.number is None and len(plan.items) == 1 and rows != mask.rows:
        text = f"{file.shown} has {rows:,} rows, the mask {mask.rows:,}"
        raise SnipError(f"{text}; for one file of a larger set say which with --start")
    if row + rows > mask.rows:
        text = f"{file.shown} is rows {row:,} to {row + rows:,} of its set, the mask has"
        raise SnipError(f"{text} {mask.rows:,}; they do not belong to the same set")
    return ~np.asarray(mask.is_dup[row : row + rows])
