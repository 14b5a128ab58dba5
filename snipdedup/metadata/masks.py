"""A mask of rows: where each metadata file lies in it.

A mask holds True and False by position only, so a file that is placed one row off would lose the
wrong rows without any error. Where a file's place cannot be proved, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.formats import map_npy
from snipdedup.features.shards import FileRows
from snipdedup.metadata.tables import Metadata
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, as_written, is_finished, read_manifest

T = TypeVar("T")
NamedSize = tuple[str, int]  # of a file: its name, its number of rows

MASK = "is_dup.npy"
# Names that hold more than the file's number: Hugging Face's (the number of files follows it),
# Spark's (the job's UUID follows it, then the number within the task).
WRITER_NAMES = re.compile(r"[0-9]+(?=[-_]of[-_][0-9]+$)|(?<=^part-)[0-9]+(?=-(tid-|[0-9a-f]{8}-))")
NUMBER = re.compile(r"[0-9]+(?![0-9A-Za-z])")
BY_KEY = "to find rows by what a column says: snip filter --on COLUMN"
HOW_TO_PLACE = (
    "give the totals of the whole set with --cumulative_sizes, keep the snip.json of snip dedup "
    f"beside the mask, or name all files from number 0 on; {BY_KEY}"
)


class Mask(NamedTuple):
    """A mask as published: ``is_dup`` (rows,) bool, memory-mapped, True = remove.

    ``meanings`` are the rows of each file of the whole set, (files,) int64, where the manifest or
    ``--cumulative_sizes`` has them: the likelier one first, if the 0 that totals begin with can
    have two (see `resolve_sizes`). ``manifest`` is that of the run which wrote the mask, beside it.
    """

    path: Path
    is_dup: np.ndarray
    meanings: Sequence[np.ndarray] = ()
    opened: FileRows | None = None
    manifest: dict[str, Any] | None = None

    @property
    def sizes(self) -> np.ndarray | None:
        """Rows of each file of the whole set, if they are known."""
        return self.meanings[0] if self.meanings else None

    @property
    def rows(self) -> int:
        """Rows of the whole set."""
        return len(self.is_dup)


def open_mask(spec: str | Path, cumulative: str | Path | None = None) -> Mask:
    """Open a ``.npy`` mask, or that of a folder that ``snip dedup`` wrote.

    ``cumulative`` is a ``.npy`` of running totals of rows a file. What is no 1-D mask, or
    contradicts its length, is refused.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        read_manifest(path, "dedup")
        path = path / MASK
    opened = FileRows([path] if path.is_file() else [], [])
    is_dup = load_mask(path)
    with as_written(path.parent):
        manifest, known = _manifest_of(path), []
        if manifest is not None:
            known = [np.array([shard["rows"] for shard in manifest["shards"]], np.int64)]
    if known and known[0].sum() != len(is_dup):
        raise SnipError(
            f"{path} has {len(is_dup):,} rows, the manifest beside it says {known[0].sum():,}; it "
            "was replaced after the run that wrote it"
        )
    if cumulative is None:
        return Mask(path, is_dup, known, opened, manifest)
    meanings = _read_totals(Path(cumulative).expanduser(), len(is_dup))
    if known and not any(np.array_equal(known[0], meaning) for meaning in meanings):
        raise SnipError(
            f"{cumulative} and {path.parent / MANIFEST} say different row counts of the "
            "files; leave out --cumulative_sizes, or move the mask away from that manifest"
        )
    return Mask(path, is_dup, known or meanings, opened, manifest)


def _manifest_of(path: Path) -> dict[str, Any] | None:
    """Return the manifest of the run of ``snip dedup`` that wrote a mask, None without one."""
    found = atomic.load_json(path.parent / MANIFEST) if is_finished(path.parent) else None
    if not isinstance(found, dict) or found.get("kind") != "dedup":
        return None
    return read_manifest(path.parent, "dedup") if path.name in found.get("outputs", {}) else None


def load_mask(path: Path) -> np.ndarray:
    """Memory-map a mask: 1-D and bool, or uint8 and int8 that hold 0 and 1 only."""
    array = _map_file(path, "mask")
    if array.ndim == 2 and 1 in array.shape:  # as upstream, which ravels what it loads
        array = array.reshape(-1)
    if array.ndim != 1 or array.dtype not in (np.bool_, np.uint8, np.int8):
        raise SnipError(
            f"{path}: expected a mask, one bool a row; found shape {array.shape}, {array.dtype}"
        )
    # A bool is a byte too: bytes other than 0 and 1 would be neither True nor False everywhere.
    values = array.view(np.uint8)
    if values.max(initial=0) > 1:
        row = int(values.argmax())
        raise SnipError(f"{path}: row {row:,} holds {values[row]}, expected 0 or 1")
    return array.view(np.bool_)


def _map_file(path: Path, what: str) -> np.ndarray:
    """Memory-map a ``.npy`` file, or refuse it by name."""
    if not path.is_file():
        raise SnipError(f"no such {what}: {path}")
    try:
        return map_npy(path)
    except OSError as error:
        raise SnipError(f"{path}: cannot be read as a {what}: {error}") from error


def _read_totals(path: Path, rows: int) -> list[np.ndarray]:
    """Return the rows of each file, (files,) int64, from a ``.npy`` of running totals.

    A leading 0 is where the first file begins (upstream's ``cum_sz`` has one), or the total after
    a first file of no rows: both meanings are returned, the likelier one first.
    """
    totals = _map_file(path, "file of running totals")
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


def resolve_sizes(mask: Mask, place: Callable[[Mask], T]) -> tuple[Mask, T]:
    """Return a mask whose sizes have one meaning, and what ``place`` returns for it.

    ``place`` raises `SnipError` where sizes do not fit the files at hand. Where a leading 0 of
    totals has two meanings, it must refuse one of them, or return the same for both.
    """
    accepted: list[tuple[Mask, T]] = []
    refusals: list[SnipError] = []
    for one in [mask._replace(meanings=[sizes]) for sizes in mask.meanings] or [mask]:
        try:
            accepted.append((one, place(one)))
        except SnipError as refusal:
            refusals.append(refusal)
    if not accepted:
        raise refusals[0]
    if accepted[0][1] != accepted[-1][1]:
        raise SnipError(
            "the totals of --cumulative_sizes begin with 0: is that where file 0 begins, or is "
            "file 0 empty? The files fit both; if file 0 begins there, leave this 0 out, else name "
            "all files of the set"
        )
    return accepted[0]


def place_metadata(
    metadata: Metadata, mask: Mask, start: int | None, end: int | None
) -> tuple[int, int, int]:
    """Place metadata in a mask: all of its files, or a range; return what `place_range` does."""
    files = metadata.sizes()
    if metadata.rows == mask.rows:  # the whole set: the number of its files tells what a 0 means
        fitting = [sizes for sizes in mask.meanings if len(sizes) == len(files)]
        mask = mask._replace(meanings=[*fitting, *mask.meanings][:1])
    if start is None and end is None:
        return place_all(files, mask)
    return resolve_sizes(mask, lambda one: place_range(files, one, start or 0, end))[1]


def place_all(files: Sequence[NamedSize], mask: Mask) -> tuple[int, int, int]:
    """Place a whole set: its files' rows must be the mask's, or it is refused."""
    total = sum(rows for _, rows in files)
    if total != mask.rows:
        raise SnipError(
            f"the metadata has {total:,} rows in {len(files)} files, the mask {mask.path} has "
            f"{mask.rows:,}; they must belong to the same set (for some of its files: --start and "
            f"--end; {BY_KEY})"
        )
    if mask.sizes is not None and len(mask.sizes) == len(files):
        check_sizes(files, mask.sizes, 0)
    return 0, len(files), 0


def place_range(
    files: Sequence[NamedSize], mask: Mask, start: int, end: int | None
) -> tuple[int, int, int]:
    """Place files ``start`` to ``end`` (exclusive, None: the last) of a set, numbered from 0.

    The files at hand may be a part of the set. It is refused if it is not certain which files are
    meant, or at which row the first one begins. Returns the positions of those that are meant
    among the files at hand (first, last exclusive), and the mask's row at which they begin.
    """
    sizes, names, rows = mask.sizes, [name for name, _ in files], [rows for _, rows in files]
    if sizes is not None and sum(rows) == mask.rows and len(files) != len(sizes):
        sizes = None  # the whole set in other files than its features: these files count
    first, last = choose_files(files, sizes, start, end)
    if sizes is not None:
        check_sizes(files[first:last], sizes, start)
        begin = int(sizes[:start].sum())
    elif first == start and (sum(rows) == mask.rows or file_numbers(names) is not None):
        begin = sum(rows[:start])
    else:
        why = f"files 0 to {start - 1} are not there"
        if first == start:
            why = f"no name has a number, and {sum(rows):,} of {mask.rows:,} rows are there"
        raise SnipError(
            f"at which row of the set {names[first]} begins is not known: {why}; {HOW_TO_PLACE}"
        )
    stop = begin + sum(rows[first:last])
    if stop > mask.rows:
        raise SnipError(
            f"files {start} to {start + last - first - 1} are rows {begin:,} to {stop:,} of their "
            f"set, the mask {mask.path} has {mask.rows:,}: it is of another set; {BY_KEY}"
        )
    return first, last, begin


def file_numbers(names: Sequence[str]) -> list[int] | None:
    """Return the numbers in names that are equal up to there, None if there are none.

    ``train-00003-of-00010.parquet`` and ``part-00003-5b54c5d5-c000.parquet`` are 3; names such as
    ``00a1f3.parquet`` have no number. Of one name alone it is the last number that no letter
    follows, but for these two kinds of names.
    """
    stems = [Path(name).name.split(".")[0] for name in names]
    known = [WRITER_NAMES.search(stem) for stem in stems]
    found = [
        list(NUMBER.finditer(stem[: match.end()] if match else stem))
        for stem, match in zip(stems, known, strict=True)
    ]
    if not stems or not all(found):
        return None
    for place in [-1] if len(stems) == 1 else range(min(map(len, found))):
        heads = {stem[: runs[place].start()] for stem, runs in zip(stems, found, strict=True)}
        numbers = [int(runs[place][0]) for runs in found]
        if len(heads) == 1 and len(set(numbers)) == len(numbers):
            return numbers
    return None


def choose_files(
    files: Sequence[NamedSize], sizes: np.ndarray | None, start: int, end: int | None
) -> tuple[int, int]:
    """Return where files ``start`` to ``end`` (None: the last) are among the files at hand.

    By position these are the set from number 0 on, or the range alone. The numbers in the names,
    if there are any, must give the same position; if they do not, known row counts decide. Returns
    positions, the second one exclusive.
    """
    numbers = file_numbers([name for name, _ in files])
    known_end = max(numbers) + 1 if numbers else len(files)
    if sizes is not None:
        known_end = len(sizes)
    end = known_end if end is None else end
    if start >= end or (sizes is not None and end > len(sizes)):
        wanted = f"files {start} to {end - 1} are" if start < end else f"file {start} is"
        raise SnipError(f"{wanted} wanted, the set of {files[0][0]} has 0 to {known_end - 1}")
    count = end - start  # may be far more than there are files
    choices = set()
    if len(files) >= end:
        choices.add(start)
    elif len(files) == count:
        choices.add(0)
    if numbers is not None:
        there = set(numbers)
        lacking = next((n for n in range(start, end) if n not in there), None)
        if lacking is not None:
            raise SnipError(
                f"files {start} to {end - 1} are wanted, but none of {files[0][0]} to "
                f"{files[-1][0]} has the number {lacking} in its name (files are counted from 0)"
            )
        choices.add(numbers.index(start))
    if len(choices) > 1 and sizes is not None:
        known = sizes[start:end].tolist()
        fitting = {c for c in choices if [rows for _, rows in files[c : c + count]] == known}
        choices = fitting or choices
    if not choices:
        raise SnipError(
            f"which of {len(files)} files are numbers {start} to {end - 1} is not certain: "
            "name all files of the set, or exactly these"
        )
    if len(choices) > 1:
        raise SnipError(
            f"is file {start} {' or '.join(sorted(files[c][0] for c in choices))}? By position "
            f"and by name it is not the same; name the files {start} to {end - 1} only"
        )
    first = choices.pop()
    return first, first + count


def check_sizes(files: Sequence[NamedSize], sizes: np.ndarray, start: int) -> None:
    """Refuse a file whose rows are not those that the set's file of that number has."""
    for number, (name, rows) in enumerate(files, start):
        if rows != sizes[number]:
            raise SnipError(
                f"{name} has {rows:,} rows, file {number} of the mask's set has "
                f"{sizes[number]:,}: it is another file, or rows were removed from it; {BY_KEY}"
            )


def file_version(path: Path) -> dict[str, int]:
    """Return what tells whether a file has changed."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def describe_kept(rows: int, kept: int, files: int) -> str:
    """Return one line about how many rows of files are kept."""
    share = f", {(rows - kept) / rows:.1%}" if rows else ""
    return f"{kept:,} of {rows:,} rows kept in {files} files ({rows - kept:,} removed{share})"
