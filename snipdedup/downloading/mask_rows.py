"""The mask of a download, and its row at which the first of the wanted files begins.

A mask that is not local is fetched into the work folder, so that a stopped run continues with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from snipdedup import progress
from snipdedup.downloading.sources import SourceFiles, find_mask
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file
from snipdedup.errors import MissingError, SnipError, TemporaryError
from snipdedup.metadata.files import open_table
from snipdedup.metadata.masks import (
    HOW_TO_PLACE,
    MASK,
    Held,
    Mask,
    by_either,
    check_sizes,
    open_mask,
    place_metadata,
)
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST
from snipdedup.storage.remote import NoRangesError, RemotePath, with_retries
from snipdedup.storage.urls import PART, is_web, redacted, scheme_of

TOTALS = "cumulative_sizes.npy"


def open_published_mask(spec: str, totals: str | None, work: Path) -> Mask:
    """Open the mask; fetch it, its manifest and the totals if they are not local."""
    mask = Path(spec)
    if scheme_of(spec):
        file, manifest = with_retries(lambda: find_mask(spec, MASK))
        mask = fetch_once(file, work / "published" / "mask")
        if manifest is not None:
            try_manifest(manifest, mask.with_name(MANIFEST))
    if totals is not None and scheme_of(totals):
        url = totals
        file, _ = with_retries(lambda: find_mask(url, TOTALS))
        totals = str(fetch_once(file, work / "published" / "totals"))
    return open_mask(mask, totals)


def fetch_once(file: SourceFile, folder: Path) -> Path:
    """Fetch a file into a folder, unless it is there."""
    target = folder / file.name
    if not target.is_file():
        with progress.bar(file.size or 0, file.name, "B") as bar:
            fetch_file(file, target, Monitor(bar))
    return target


def try_manifest(file: SourceFile, target: Path) -> None:
    """Fetch the manifest beside a mask, if there is one."""
    try:
        fetch_file(file, target)
        atomic.load_json(target)
    except MissingError:
        return
    except TemporaryError:
        raise
    except SnipError:  # some servers answer every name with a page
        target.unlink(missing_ok=True)


def resolve_totals(mask: Mask, found: SourceFiles, work: Path, jobs: int) -> Mask:
    """Return the mask with the one meaning of its totals that the files of a range fit."""
    first = found.first
    if mask.other is None or first is None:
        return mask
    held = Held([file.shown for file in found.files], count_rows(found.files, work, jobs))

    def first_row(one: Mask) -> int:
        sizes = np.empty(0, np.int64) if one.sizes is None else one.sizes
        refuse_beyond(first, len(held.rows), len(sizes))
        check_sizes(held, sizes, first)
        return int(sizes[:first].sum())

    return by_either(mask, first_row)[0]


def refuse_beyond(first: int, count: int, files: int) -> None:
    """Refuse file numbers that a mask's set does not have."""
    if first + count > files:
        raise SnipError(
            f"files {first} to {first + count - 1} are wanted, the mask's set has 0 to {files - 1}"
        )


def find_first_row(source: str, found: SourceFiles, mask: Mask, work: Path, jobs: int) -> int:
    """Return the mask's row at which the first file begins.

    Raises
    ------
    SnipError
        If it is not certain.
    """
    first, count = found.first, len(found.files)
    if not scheme_of(source) and PART not in source:
        metadata = open_metadata(source)
        placed = place_metadata(metadata, mask, first, None if first is None else first + count)
        return placed.offset + int(metadata.offsets[placed.first])
    if first is None:
        # the rows of a single web file are compared when it has come
        rows = mask.rows if is_web(source) else sum(count_rows(found.files, work, jobs))
        if rows != mask.rows:
            raise SnipError(
                f"{redacted(source)} has {rows:,} rows in {count} files, the mask {mask.rows:,}; "
                "they must be the same set (for some files, say which with --start and --end; "
                "to find rows by what a column says, download all and snip filter --on COLUMN)"
            )
        return 0
    if mask.sizes is not None:
        refuse_beyond(first, count, len(mask.sizes))
        return int(mask.sizes[:first].sum())
    if found.before is None:
        raise SnipError(f"at which row {found.files[0].shown} begins is not known; {HOW_TO_PLACE}")
    return sum(count_rows(found.before, work, jobs))


def count_rows(files: Sequence[SourceFile], work: Path, jobs: int) -> list[int]:
    """Count the rows of each file, by its footer if the server sends ranges."""

    def count(file: SourceFile) -> int:
        try:
            if not scheme_of(file.url):
                return open_table(Path(file.url)).rows
            if Path(file.name).suffix.lower() == ".parquet":
                try:
                    return open_table(RemotePath(file.url, file.token)).rows
                except NoRangesError:
                    pass
            copy = work / "counted" / file.name
            fetch_file(file, copy, monitor)
            rows = open_table(copy).rows
            copy.unlink()
            return rows
        except TemporaryError:
            raise
        except SnipError as error:
            raise SnipError(
                f"the mask's place needs the rows of {file.name}: {error}; or {HOW_TO_PLACE}"
            ) from error

    monitor = Monitor()
    counted = monitor.map(count, files, jobs)
    return list(progress.track(counted, "rows of files", "files", len(files)))
