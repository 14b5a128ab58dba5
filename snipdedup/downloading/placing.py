"""A mask from anywhere, and the row of it at which the first of some files begins.

What is not local comes into the work folder first, so that a stopped run goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from snipdedup import progress
from snipdedup.downloading import sources, transfer
from snipdedup.downloading.parallel import side_by_side
from snipdedup.downloading.sources import Found
from snipdedup.downloading.transfer import Watch
from snipdedup.errors import SnipError
from snipdedup.metadata.masks import (
    HOW_TO_PLACE,
    MASK,
    FileSizes,
    Mask,
    check_sizes,
    open_mask,
    place_metadata,
    resolve_sizes,
)
from snipdedup.metadata.tables import open_metadata, open_table
from snipdedup.storage import atomic, buckets, http
from snipdedup.storage.manifest import MANIFEST
from snipdedup.storage.urls import MissingError, Remote, TemporaryError, is_web, redacted, scheme_of

TOTALS = "cumulative_sizes.npy"
PUBLISHED = "published"  # below the work folder: mask, totals, and the manifest beside the mask


def published_mask(spec: str, totals: str | None, work: Path) -> Mask:
    """Open the mask; what is not local is brought into the work folder first."""
    folder, mask = work / PUBLISHED, Path(spec)
    if scheme_of(spec):
        remote, manifest = look_up(spec, MASK)
        mask = local_copy(remote, folder / "mask")
        if manifest is not None:
            try_manifest(manifest, folder / "mask" / MANIFEST)
    if totals is not None and scheme_of(totals):
        remote, _ = look_up(totals, TOTALS)
        totals = str(local_copy(remote, folder / "totals"))
    return open_mask(mask, totals)


def look_up(location: str, name: str) -> tuple[Remote, Remote | None]:
    """Return a file, or ``name`` in a folder, and the manifest beside it; see `sources.file_in`."""
    return transfer.patiently(lambda: sources.file_in(location, name))


def local_copy(remote: Remote, folder: Path) -> Path:
    """Bring one file into a folder, unless it is there."""
    target = folder / remote.name
    if not target.is_file():
        with progress.bar(remote.size or 0, remote.name, "B") as bar:
            transfer.save(remote, target, Watch(bar))
    return target


def try_manifest(remote: Remote, target: Path) -> None:
    """Fetch the manifest beside a mask, where there is one."""
    try:
        transfer.save(remote, target)
        atomic.load_json(target)
    except MissingError:
        return
    except TemporaryError:
        raise
    except SnipError:  # some servers answer every name with a page
        target.unlink(missing_ok=True)


def settled(mask: Mask, found: Found, work: Path, jobs: int) -> Mask:
    """Return a mask whose totals have one meaning: that which the files of a range fit."""
    first = found.first
    if mask.other_sizes is None or first is None:
        return mask
    held = FileSizes([file.shown for file in found.files], counts(found.files, work, jobs))

    def begins(one: Mask) -> int:
        sizes = np.empty(0, np.int64) if one.sizes is None else one.sizes
        if first + len(held.rows) > len(sizes):
            raise beyond(first, len(held.rows), len(sizes))
        check_sizes(held, sizes, first)
        return int(sizes[:first].sum())

    return resolve_sizes(mask, begins)[0]


def beyond(first: int, count: int, files: int) -> SnipError:
    """Return the refusal of file numbers that a mask's set does not have."""
    return SnipError(
        f"files {first} to {first + count - 1} are wanted, the mask's set has 0 to {files - 1}"
    )


def place(source: str, found: Found, mask: Mask, work: Path, jobs: int) -> int:
    """Return the row of the set at which the first file begins; check what is known by now.

    Raises
    ------
    SnipError
        If it is not certain.
    """
    first, count = found.first, len(found.files)
    if not scheme_of(source) and sources.PART not in source:
        metadata = open_metadata(source)
        placed = place_metadata(metadata, mask, first, None if first is None else first + count)
        return placed.offset + int(metadata.offsets[placed.first])
    if first is None:
        rows = mask.rows if is_web(source) else count_rows(found.files, work, jobs)
        if rows != mask.rows:  # one URL is compared as it lands
            raise SnipError(
                f"{redacted(source)} has {rows:,} rows in {count} files, the mask {mask.rows:,}; "
                "they must be the same set (for some files, say which with --start and --end; "
                "to find rows by what a column says, download all and snip filter --on COLUMN)"
            )
        return 0
    if mask.sizes is not None:
        if first + count > len(mask.sizes):
            raise beyond(first, count, len(mask.sizes))
        return int(mask.sizes[:first].sum())
    if found.before is None:
        raise SnipError(f"at which row {found.files[0].shown} begins is not known; {HOW_TO_PLACE}")
    return count_rows(found.before, work, jobs)


def count_rows(files: Sequence[Remote], work: Path, jobs: int) -> int:
    """Count the rows of files; see `counts`."""
    return sum(counts(files, work, jobs))


def counts(files: Sequence[Remote], work: Path, jobs: int) -> list[int]:
    """Count the rows of each file, by its footer where the other side sends parts."""

    def count(file: Remote) -> int:
        try:
            return transfer.patiently(lambda: rows_in(file, work), watch)
        except TemporaryError:
            raise
        except SnipError as error:
            raise SnipError(
                f"the mask's place needs the rows of {file.name}: {error}; or {HOW_TO_PLACE}"
            ) from error

    watch = Watch()
    counted = side_by_side(count, files, jobs, watch)
    return list(progress.track(counted, "rows of files", "files", len(files)))


def rows_in(file: Remote, work: Path) -> int:
    """Return the rows of one file; where parts are not sent, all of it has to come."""
    rows: int | None = None
    if not scheme_of(file.url):
        return open_table(Path(file.url)).rows
    if Path(file.name).suffix.lower() == ".parquet":
        rows = http.parquet_rows(file) if is_web(file.url) else buckets.parquet_rows(file)
    if rows is None:
        copy = work / "counted" / file.name
        transfer.save(file, copy)
        rows = open_table(copy).rows
        copy.unlink()
    return rows
