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
from snipdedup.metadata.masks import (
    HOW_TO_PLACE,
    MASK,
    FileSizes,
    Mask,
    check_sizes,
    open_mask,
    resolve_sizes,
)
from snipdedup.metadata.tables import open_table
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import RemotePath
from snipdedup.storage.web import NoRangesError, is_web, redacted, scheme_of

TOTALS = "cumulative_sizes.npy"


def open_published_mask(spec: str, totals: str | None, work: Path) -> Mask:
    """Open the mask; fetch it, its manifest and the totals if they are not local."""
    mask = Path(spec)
    if scheme_of(spec):
        file, manifest = find_mask(spec, MASK)
        mask = fetch_once(file, work / "published" / "mask")
        if manifest is not None:
            try_manifest(manifest, mask.with_name(MANIFEST))
    if totals is not None and scheme_of(totals):
        file, _ = find_mask(totals, TOTALS)
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


def place_mask(
    source: str, found: SourceFiles, mask: Mask, work: Path, jobs: int
) -> tuple[Mask, int]:
    """Return the mask, with the one meaning of its totals, and the row of the first file in it.

    Raises
    ------
    SnipError
        If it is not certain.
    """
    first, count = found.first, len(found.files)
    if first is None:
        # the rows of a single web file are compared when it has come
        rows = mask.rows if is_web(source) else sum(count_rows(found.files, work, jobs))
        if rows != mask.rows:
            raise SnipError(
                f"{redacted(source)} has {rows:,} rows in {count} files, the mask {mask.rows:,}; "
                f"for a part of a set say which with --start and --end; or {HOW_TO_PLACE}"
            )
        return mask, 0
    if mask.sizes is None:
        if found.before is None:
            name = found.files[0].shown
            raise SnipError(f"at which row {name} begins is not known; {HOW_TO_PLACE}")
        return mask, sum(count_rows(found.before, work, jobs))
    names = [file.shown for file in found.files]
    rows_here = None if mask.other_sizes is None else count_rows(found.files, work, jobs)

    def first_row(one: Mask) -> int:
        sizes = np.empty(0, np.int64) if one.sizes is None else one.sizes
        if first + count > len(sizes):
            wanted = f"files {first} to {first + count - 1} are wanted"
            raise SnipError(f"{wanted}, the mask's set has 0 to {len(sizes) - 1}")
        if rows_here is not None:
            check_sizes(FileSizes(names, rows_here), sizes, first)
        return int(sizes[:first].sum())

    return resolve_sizes(mask, first_row)


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
            text = f"the mask's place needs the rows of {file.name}: {error}; or {HOW_TO_PLACE}"
            raise SnipError(text) from error

    monitor = Monitor()
    counted = monitor.map(count, files, jobs)
    return list(progress.track(counted, "rows of files", "files", len(files)))
