"""A mask of rows: where each metadata file lies in it.

A mask says nothing but True and False by position, so a file that is placed one row off is
destroyed in silence. Where a file's place cannot be proved, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from snipdedup.errors import SnipError
from snipdedup.features.formats import map_npy
from snipdedup.features.shards import identities, refuse_changed
from snipdedup.metadata.tables import Metadata
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, as_written, is_finished, read_manifest

T = TypeVar("T")

MASK = "is_dup.npy"
FILES = "files"  # below the work folder: what is written before it is whole
SCAN_ROWS = 1 << 24
# Whose names hold more than the file's number: Hugging Face's (the number of files follows it),
# Spark's (the job's UUID follows it, then the number within the task).
WRITTEN_BY = re.compile(r"[0-9]+(?=[-_]of[-_][0-9]+$)|(?<=^part-)[0-9]+(?=-(tid-|[0-9a-f]{8}-))")
HOW_TO_PLACE = (
    "give the totals of the whole set with --cumulative_sizes, keep the snip.json of snip dedup "
    "beside the mask, or name all files from number 0 on; or find rows by what a column says: "
    "snip filter --on COLUMN"
)


@dataclass(frozen=True)
class Mask:
    """A mask as published.

    Attributes
    ----------
    path : Path
    is_dup : (rows,) bool
        Memory-mapped; True = remove.
    sizes : (files,) int64 or None
        Rows of each file of the whole set, where the manifest or ``--cumulative_sizes`` says so.
    other : (files + 1,) int64 or None
        What ``sizes`` are if the 0 that running totals begin with is a first file of no rows;
        see `by_either`.
    """

    path: Path
    is_dup: np.ndarray
    sizes: np.ndarray | None
    opened: Sequence[tuple[int, int, int]] = ()
    other: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Rows of the whole set."""
        return len(self.is_dup)

    def refuse_changed(self) -> None:
        """Refuse a mask that changed since it was opened; see `shards.refuse_changed`."""
        refuse_changed([self.path][: len(self.opened)], self.opened)


@dataclass(frozen=True)
class Place:
    """Which files of a `Metadata` are meant, and where its row 0 lies in the mask.

    ``number`` is the first file's number in the whole set.
    """

    first: int
    last: int
    number: int
    offset: int


def open_mask(spec: str | Path, cumulative: str | Path | None = None) -> Mask:
    """Open a mask.

    Parameters
    ----------
    spec : str or Path
        A ``.npy`` file, ours or a published one, or a folder that ``snip dedup`` wrote.
    cumulative : str or Path, optional
        A ``.npy`` of running totals of rows a file.

    Raises
    ------
    SnipError
        If it is no 1-D mask, or what is said of its files contradicts its length.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        read_manifest(path, "dedup")
        path = path / MASK
    opened = identities([path]) if path.is_file() else ()
    is_dup = load_mask(path)
    with as_written(path.parent):
        sizes = manifest_sizes(path, len(is_dup))
    if cumulative is None:
        return Mask(path, is_dup, sizes, opened)
    meanings = read_totals(Path(cumulative).expanduser(), len(is_dup))
    if sizes is None:
        return Mask(path, is_dup, meanings[0], opened, *meanings[1:])
    if not any(np.array_equal(sizes, meant) for meant in meanings):
        raise SnipError(
            f"{cumulative} and {path.parent / MANIFEST} say different row counts of the "
            "files; leave out --cumulative_sizes, or move the mask away from that manifest"
        )
    return Mask(path, is_dup, sizes, opened)


def load_npy(path: Path, what: str) -> np.ndarray:
    """Memory-map a ``.npy`` file, or refuse it by name."""
    if not path.is_file():
        raise SnipError(f"no such {what}: {path}")
    try:
        return map_npy(path)
    except OSError as error:
        raise SnipError(f"{path}: cannot be read as a {what}: {error}") from error


def load_mask(path: Path) -> np.ndarray:
    """Memory-map a mask: 1-D and bool, or uint8 and int8 that hold 0 and 1 only."""
    array = load_npy(path, "mask")
    if array.ndim == 2 and 1 in array.shape:  # as upstream, who ravels what was loaded
        array = array.reshape(-1)
    if array.ndim != 1 or array.dtype not in (np.bool_, np.uint8, np.int8):
        raise SnipError(
            f"{path}: expected a mask, one bool a row; found shape {array.shape}, {array.dtype}"
        )
    # A bool is a byte too: bytes other than 0 and 1 would be neither True nor False everywhere.
    values = array.view(np.uint8)
    for start in range(0, len(values), SCAN_ROWS):
        wrong = values[start : start + SCAN_ROWS] > 1
        if wrong.any():
            row = start + int(np.argmax(wrong))
            raise SnipError(f"{path}: row {row:,} holds {values[row]}, expected 0 or 1")
    return array.view(np.bool_)


def manifest_sizes(path: Path, rows: int) -> np.ndarray | None:
    """Return the rows of each shard from the manifest beside a mask of ours, None without one."""
    beside = path.parent / MANIFEST
    if not is_finished(path.parent):
        return None
    manifest = atomic.load_json(beside)
    if not isinstance(manifest, dict) or manifest.get("kind") != "dedup":
        return None
    if path.name not in manifest.get("outputs", {}):
        return None
    sizes = np.array([shard["rows"] for shard in manifest["shards"]], np.int64)
    if int(sizes.sum()) != rows:
        raise SnipError(
            f"{path} has {rows:,} rows, its manifest {beside} says {int(sizes.sum()):,}; it was "
            "replaced after the run that wrote it"
        )
    return sizes


def read_totals(path: Path, rows: int) -> list[np.ndarray]:
    """Return the rows of each file, (files,) int64, from a ``.npy`` of running totals.

    A leading 0 is where the first file begins (upstream's ``cum_sz`` has one), or the total after
    a first file of no rows: both are returned, the likelier one first.
    """
    totals = load_npy(path, "file of running totals")
    if totals.ndim != 1 or not len(totals) or totals.dtype.kind not in "iuf":
        raise SnipError(
            f"{path}: expected 1-D running totals of rows, found shape {totals.shape}, "
            f"{totals.dtype}"
        )
    whole = np.asarray(totals).astype(np.int64)
    sizes = np.diff(whole, prepend=0)
    if (sizes < 0).any() or not np.array_equal(whole, totals):
        raise SnipError(f"{path}: expected whole numbers that never fall, as running totals do")
    if whole[-1] != rows:
        raise SnipError(
            f"{path} ends at {int(whole[-1]):,} rows, the mask has {rows:,}; they belong to "
            "different sets"
        )
    return [sizes[1:], sizes] if whole[0] == 0 and len(whole) > 1 else [sizes]


def by_either(mask: Mask, ask: Callable[[Mask], T]) -> tuple[Mask, T]:
    """Return what a function says of a mask, and the mask with what its totals mean.

    Where a leading 0 can be read in two ways, the function, which raises `SnipError` where sizes
    do not fit the files that are there, must say the same of both, or refuse one.
    """
    if mask.other is None:
        return mask, ask(mask)
    said: list[tuple[Mask, T]] = []
    refusals: list[SnipError] = []
    for sizes in (mask.sizes, mask.other):
        one = replace(mask, sizes=sizes, other=None)
        try:
            said.append((one, ask(one)))
        except SnipError as refusal:
            refusals.append(refusal)
    if not said:
        raise refusals[0]
    if any(answer != said[0][1] for _, answer in said):
        raise SnipError(
            "the totals of --cumulative_sizes begin with 0: is that where file 0 begins, or is "
            "file 0 empty? The files that are there fit both, at different rows of the mask; if it "
            "is where file 0 begins, leave this 0 out, else name all files of the set"
        )
    return said[0]


def file_numbers(names: Sequence[str]) -> list[int] | None:
    """Return the numbers in names that differ by nothing else before it, None where there are none.

    ``train-00003-of-00010.parquet`` and ``part-00003-5b54c5d5-c000.parquet`` are 3; names such as
    ``00a1f3.parquet`` have no number. Of one name alone it is the last number that no letter
    follows, but for these two kinds of names.
    """
    pattern = re.compile(r"[0-9]+(?![0-9A-Za-z])")
    stems = [Path(name).name.split(".")[0] for name in names]
    told = [WRITTEN_BY.search(stem) for stem in stems]
    found = [
        list(pattern.finditer(stem[: one.end()] if one else stem))
        for stem, one in zip(stems, told, strict=True)
    ]
    if not stems or not all(found):
        return None
    for place in [-1] if len(stems) == 1 else range(min(map(len, found))):
        heads = {stem[: runs[place].start()] for stem, runs in zip(stems, found, strict=True)}
        numbers = [int(runs[place][0]) for runs in found]
        if len(heads) == 1 and len(set(numbers)) == len(numbers):
            return numbers
    return None


@dataclass(frozen=True)
class Held:
    """The metadata files that are there: name and row count of each, in order."""

    names: Sequence[str]
    rows: Sequence[int]

    @property
    def total(self) -> int:
        """Rows of all files."""
        return sum(self.rows)


def place_all(held: Held, mask: Mask) -> Place:
    """Place a whole set: its files' rows must be the mask's, or it is refused."""
    if held.total != mask.rows:
        raise SnipError(
            f"the metadata has {held.total:,} rows in {len(held.rows)} files, the mask "
            f"{mask.path} has {mask.rows:,}; they must belong to the same set (for some files of "
            "it, say which with --start and --end; to find rows by what a column says, --on COLUMN)"
        )
    if mask.sizes is not None and len(mask.sizes) == len(held.rows):
        check_sizes(held, mask.sizes, 0)
    return Place(0, len(held.rows), 0, 0)


def place_range(held: Held, mask: Mask, start: int, end: int | None) -> Place:
    """Place files ``start`` to ``end`` (exclusive) of a set of which those held may be a part.

    Parameters
    ----------
    held : Held
    mask : Mask
        Of the whole set.
    start, end : int
        File numbers in the whole set, from 0; None for its end.

    Raises
    ------
    SnipError
        If it is not certain which files are meant, or at which row the first one begins.
    """
    sizes = mask.sizes
    if sizes is not None and held.total == mask.rows and len(held.rows) != len(sizes):
        sizes = None  # the whole set in other files than its features: these files count
    numbers = file_numbers(held.names)
    if end is None:
        end = max(numbers) + 1 if numbers else len(held.rows)
        end = len(sizes) if sizes is not None else end
    if start >= end or (sizes is not None and end > len(sizes)):
        known = end if sizes is None else len(sizes)
        raise SnipError(f"files {start} to {end - 1} are wanted, the set has 0 to {known - 1}")
    first = choose_files(held, numbers, sizes, start, end)
    part = Held(held.names[first : first + end - start], held.rows[first : first + end - start])
    if sizes is not None:
        check_sizes(part, sizes, start)
        begin = int(sizes[:start].sum())
    else:
        begin = rows_before(held, numbers, mask.rows, first, start)
    if begin + part.total > mask.rows:
        raise SnipError(
            f"files {start} to {end - 1} are rows {begin:,} to {begin + part.total:,} of their "
            f"set, the mask {mask.path} has {mask.rows:,}; they do not belong to the same set; to "
            "find rows by what a column says: --on COLUMN"
        )
    return Place(first, first + end - start, start, begin - sum(held.rows[:first]))


def rows_before(
    held: Held, numbers: list[int] | None, mask_rows: int, first: int, start: int
) -> int:
    """Return the set's row at which file ``start`` begins, from the files before it."""
    if first != start:
        raise SnipError(
            f"at which row of the set {held.names[first]} begins is not known: files 0 to "
            f"{start - 1} are not there; {HOW_TO_PLACE}"
        )
    if numbers is None and held.total != mask_rows:
        raise SnipError(
            f"whether {held.names[0]} is file 0 of the set is not known: its name has no number, "
            f"and the {len(held.rows)} files have {held.total:,} rows, not the mask's "
            f"{mask_rows:,}; {HOW_TO_PLACE}"
        )
    return sum(held.rows[:start])


def choose_files(
    held: Held, numbers: list[int] | None, sizes: np.ndarray | None, start: int, end: int
) -> int:
    """Return the position of file ``start`` among the files that are there.

    By position the files are the set from number 0 on, or the range alone. The numbers in the
    names, where there are any, must say the same; where they do not, known row counts decide.
    """
    wanted = range(start, end)  # may be far more than there are files
    choices = set()
    if len(held.rows) >= end:
        choices.add(start)
    elif len(held.rows) == len(wanted):
        choices.add(0)
    if numbers is not None:
        by_name = numbers.index(start) if start in numbers else len(numbers)
        named = numbers[by_name : by_name + len(wanted)]
        if len(named) < len(wanted) or named != list(wanted):
            there = set(numbers)
            lacking = next((number for number in wanted if number not in there), start)
            raise SnipError(
                f"files {start} to {end - 1} are wanted, but none of {held.names[0]} to "
                f"{held.names[-1]} has the number {lacking} in its name (files are counted from 0)"
            )
        choices.add(by_name)
    if len(choices) > 1 and sizes is not None:
        known = sizes[start:end].tolist()
        choices = {c for c in choices if list(held.rows[c : c + len(wanted)]) == known} or choices
    if not choices:
        raise SnipError(
            f"which of {len(held.rows)} files are numbers {start} to {end - 1} is not certain: "
            "name all files of the set, or exactly these"
        )
    if len(choices) > 1:
        raise SnipError(
            f"is file {start} {' or '.join(sorted(held.names[c] for c in choices))}? By position "
            f"and by name it is not the same; name the files {start} to {end - 1} only"
        )
    return choices.pop()


def check_sizes(held: Held, sizes: np.ndarray, start: int) -> None:
    """Refuse a file whose rows are not those that the set's file of that number has."""
    for number, (count, name) in enumerate(zip(held.rows, held.names, strict=True), start):
        if count != sizes[number]:
            raise SnipError(
                f"{name} has {count:,} rows, file {number} of the mask's set has "
                f"{int(sizes[number]):,}; this is another file, or rows were removed from it; to "
                "find rows by what a column says: --on COLUMN"
            )


def place_metadata(metadata: Metadata, mask: Mask, start: int | None, end: int | None) -> Place:
    """Place files in a mask: all of them, or a range by `place_range`."""
    held = Held([str(f.path) for f in metadata.files], [f.rows for f in metadata.files])
    if mask.other is not None and held.total == mask.rows:  # the whole set: its files count
        sizes = mask.other if len(mask.other) == len(held.rows) else mask.sizes
        mask = replace(mask, sizes=sizes, other=None)
    if start is None and end is None:
        return place_all(held, mask)
    return by_either(mask, lambda one: place_range(held, one, start or 0, end))[1]


def stamp(path: Path) -> dict[str, int]:
    """Return what tells that a file is not the one it was."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def rows_of(path: Path) -> int:
    """Return the rows of a parquet file."""
    return int(pq.read_metadata(path).num_rows)


def summary(files: Sequence[dict[str, Any]]) -> str:
    """Say in one line how many rows stay."""
    rows, kept = (sum(file[name] for file in files) for name in ("rows", "kept"))
    share = f", {(rows - kept) / rows:.1%}" if rows else ""
    return f"{kept:,} of {rows:,} rows stay in {len(files)} files ({rows - kept:,} removed{share})"
