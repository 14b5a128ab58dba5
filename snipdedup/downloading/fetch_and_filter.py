"""Fetch the files of a set several at a time; filter each by the mask as it arrives.

A file is fetched to its place, or below ``arrived/`` if it has to be filtered. Another done file is
written when its outputs are complete, so that a stopped run fetches and filters nothing twice, and
uses no file that was damaged since. The row of the mask at which the first file begins must be
certain before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.downloading.sources import SourceFiles, find_mask
from snipdedup.downloading.transfer import Monitor, SourceFile, done_file_of, fetch_file, fetch_once
from snipdedup.errors import SnipError, TemporaryError
from snipdedup.metadata import masks
from snipdedup.metadata.kept_rows import count_kept, feature_rows, write_kept, write_kept_features
from snipdedup.metadata.masks import HOW_TO_PLACE, Mask
from snipdedup.metadata.tables import Metadata, Table
from snipdedup.storage import atomic
from snipdedup.storage.listing import FEATURES, METADATA
from snipdedup.storage.out_folder import FILES, MANIFEST
from snipdedup.storage.remote import path_of
from snipdedup.storage.web import NoRangesError, is_web, scheme_of

TOTALS = "cumulative_sizes.npy"


@dataclass(frozen=True)
class DownloadItem:
    """One file of metadata to fetch, its number in the set if known, and its features."""

    table: SourceFile
    number: int | None
    features: SourceFile | None = None

    def places(self, folder: Path, suffix: str | None = None) -> dict[Path, SourceFile]:
        """Return where the files lie in a folder that is laid out as OUT is."""
        name = self.table.name if suffix is None else Path(self.table.name).stem + suffix
        if self.features is None:
            return {folder / name: self.table}
        features = folder / FEATURES / self.features.name
        return {folder / METADATA / name: self.table, features: self.features}


@dataclass(frozen=True)
class DownloadPlan:
    """What a run fetches into its work folder, and the row of the mask at which it begins."""

    items: list[DownloadItem]
    mask: Mask | None
    first_row: int
    work: Path

    def arrived(self) -> Path:
        """Return the folder that files are fetched to."""
        return self.work / (FILES if self.mask is None else "arrived")

    def outputs(self, item: DownloadItem) -> list[Path]:
        """Return where the files of an item lie when they are complete."""
        return [*item.places(self.work / FILES, None if self.mask is None else ".parquet")]

    def done_file(self, item: DownloadItem) -> Path:
        """Return the done file that is written when the outputs of an item are complete."""
        return self.work / "done" / f"{item.table.name}.json"


def fetch_items(plan: DownloadPlan, jobs: int) -> Iterator[dict[str, Any]]:
    """Fetch files several at a time, filter them in order; yield their entries of the manifest."""
    # what a stopped run completed, and what was not damaged since then
    done = [atomic.read_done(plan.done_file(item), plan.work / FILES) for item in plan.items]
    pending = [item for item, about in zip(plan.items, done, strict=True) if about is None]
    arrived, row = plan.arrived(), plan.first_row
    total = sum(file.size or 0 for item in pending for file in item.places(arrived).values())
    with progress.bar(total, "download", "B") as bar:
        monitor = Monitor(bar)

        def fetch(item: DownloadItem) -> dict[str, Any]:
            places = item.places(arrived).items()
            table, *_ = [fetch_once(file, path, monitor) for path, file in places]
            return table

        with closing(monitor.map(fetch, pending, jobs)) as fetched:
            for item, earlier in zip(plan.items, done, strict=True):
                about = earlier or finish_item(item, plan, row, next(fetched))
                yield about
                row += about["rows"]


def finish_item(
    item: DownloadItem, plan: DownloadPlan, row: int, about: dict[str, Any]
) -> dict[str, Any]:
    """Check files that arrived, filter them by the mask, and write their done file.

    ``row`` is their first row in the set. Returns the manifest's entry, which ``about`` begins.
    """
    paths, outputs = [*item.places(plan.arrived())], plan.outputs(item)
    about |= {**check_item(item, paths), "first_row": row}
    if plan.mask is not None:
        if item.number is None and len(plan.items) == 1:
            masks.place_all([(item.table.shown, about["rows"])], plan.mask)
        about |= filter_item(item, paths, outputs, plan.mask, row)
    named = {path.relative_to(plan.work / FILES).as_posix(): path for path in outputs}
    atomic.write_done_file(plan.done_file(item), named, about)
    for path in paths:
        done_file_of(path).unlink()
        if path not in outputs:
            path.unlink()
    return about


def check_item(item: DownloadItem, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the manifest's entry of one file and its features; refuse what is not such files."""
    rows = count_arrived(item.table, paths[0], "metadata")
    about = {"name": paths[0].name, "source": item.table.shown, "number": item.number}
    about |= {"rows": rows, "kept": rows}
    if item.features is None:
        return about
    found = count_arrived(item.features, paths[1], "features")
    if found != rows:
        where = f"{item.features.shown} has {found:,} rows, its metadata {item.table.shown}"
        raise SnipError(f"{where} {rows:,}; they do not belong together")
    return {**about, "features": paths[1].name, "features_source": item.features.shown}


def count_arrived(file: SourceFile, path: Path, what: str) -> int:
    """Return the rows of a file that was fetched; remove one that is not what it should be."""
    try:
        return Table(path).rows if what == "metadata" else feature_rows(path)
    except SnipError as error:
        for arrived in (path, done_file_of(path)):
            arrived.unlink(missing_ok=True)
        raise SnipError(f"{file.shown}: expected {what}, found another file: {error}") from error


def filter_item(
    item: DownloadItem, paths: Sequence[Path], outputs: Sequence[Path], mask: Mask, row: int
) -> dict[str, Any]:
    """Write the kept rows of one file, whose first row is ``row`` of the set, and its features.

    A file that is not the mask's is refused.
    """
    table, name = Table(paths[0]), item.table.shown
    stop = row + table.rows
    if item.number is not None and mask.sizes is not None and item.number < len(mask.sizes):
        masks.check_sizes([(name, table.rows)], mask.sizes, item.number)
    if stop > mask.rows:
        text = f"{name} is rows {row:,} to {stop:,} of its set, the mask has {mask.rows:,}"
        raise SnipError(f"{text}; they do not belong to the same set")
    is_dup = np.array(mask.is_dup[row:stop])
    write_kept(Metadata([table]), is_dup, outputs[0].parent)
    for path, output in zip(paths[1:], outputs[1:], strict=True):
        write_kept_features(path, output, is_dup)
    return {"name": outputs[0].name, "kept": count_kept(is_dup)}


def open_published_mask(spec: str, totals: str | None, work: Path) -> Mask:
    """Open the mask; fetch it, its manifest and the totals if they are not local.

    A stopped run continues with those that it fetched.
    """

    def fetch_here(file: SourceFile, folder: Path) -> Path:
        with progress.bar(file.size or 0, file.name, "B") as bar:
            fetch_once(file, folder / file.name, Monitor(bar))
        return folder / file.name

    mask = Path(spec)
    if scheme_of(spec):
        file, manifest = find_mask(spec, masks.MASK)
        mask = fetch_here(file, work / "published" / "mask")
        beside = mask.with_name(MANIFEST)
        try:
            if manifest is not None:
                fetch_file(manifest, beside)
                atomic.load_json(beside)
        except TemporaryError:
            raise
        except SnipError:  # there is none; some servers answer every name with a page
            beside.unlink(missing_ok=True)
    if totals is not None and scheme_of(totals):
        totals = str(fetch_here(find_mask(totals, TOTALS)[0], work / "published" / "totals"))
    return masks.open_mask(mask, totals)


def place_mask(found: SourceFiles, mask: Mask, work: Path, jobs: int) -> tuple[Mask, int]:
    """Return the mask, with one meaning of its totals, and the row of the first file in it.

    It is refused if that row is not certain.
    """
    first, count, names = found.first, len(found.files), [file.shown for file in found.files]

    def count_files() -> list[masks.NamedSize]:
        return list(zip(names, count_rows(found.files, work, jobs), strict=True))

    if first is None:
        if count > 1 or not is_web(found.files[0].url):  # else it is counted when it has come
            masks.place_all(count_files(), mask)
        return mask, 0
    if mask.sizes is None:
        if found.before is None:
            raise SnipError(f"at which row {names[0]} begins is not known; {HOW_TO_PLACE}")
        return mask, sum(count_rows(found.before, work, jobs))
    files = count_files() if len(mask.meanings) > 1 else []

    def first_row(one: Mask) -> int:
        sizes = np.empty(0, np.int64) if one.sizes is None else one.sizes
        if first + count > len(sizes):
            wanted = f"{names[0]}: files {first} to {first + count - 1} are wanted"
            raise SnipError(f"{wanted}, the mask's set has 0 to {len(sizes) - 1}")
        masks.check_sizes(files, sizes, first)
        return int(sizes[:first].sum())

    return masks.resolve_sizes(mask, first_row)


def count_rows(files: Sequence[SourceFile], work: Path, jobs: int) -> list[int]:
    """Count the rows of each file, by its footer if the server sends ranges."""

    def count(file: SourceFile) -> int:
        copy = work / "counted" / file.name
        try:
            try:
                return Table(path_of(file.url, file.token)).rows
            except NoRangesError:
                fetch_file(file, copy, monitor)
                return Table(copy).rows
        except TemporaryError:
            raise
        except SnipError as error:
            text = f"the mask's place needs the rows of {file.name}: {error}; or {HOW_TO_PLACE}"
            raise SnipError(text) from error
        finally:
            copy.unlink(missing_ok=True)

    monitor = Monitor()
    counted = monitor.map(count, files, jobs)
    return list(progress.track(counted, "rows of files", "files", len(files)))
