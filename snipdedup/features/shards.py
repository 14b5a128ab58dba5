"""Rows over shards: which files make up an input, in which order, and how rows are read.

A row number is global: the shard's offset plus the place in the shard. Plans (which rows, which
files) are pure functions; reading comes after them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import MOST_FILES
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.features.formats import SUFFIXES, ArrayShard, NpyShard, Shard, open_npz
from snipdedup.features.hashing import checksum_text, row_hashes, rows_checksum, shard_checksum
from snipdedup.features.parquet import ParquetShard
from snipdedup.storage.listing import find_files, metadata_beside
from snipdedup.storage.remote import RemotePath, is_remote, map_requests
from snipdedup.storage.web import redacted

IMAGE_WORDS = {"img", "image", "images", "vision", "visual"}
TEXT_WORDS = {"txt", "text", "texts", "caption", "captions", "title"}


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of shard number ``shard``."""

    shard: int
    start: int
    stop: int


def plan_blocks(rows: int, size: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into blocks (start, stop) of ``size``, aligned to global row 0."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def plan_pieces(offsets: np.ndarray, start: int, stop: int) -> list[Piece]:
    """Return the pieces of shards that make up global rows ``start`` to ``stop``.

    Parameters
    ----------
    offsets : (shards + 1,) int64
        Global row of each shard's first row, then the number of rows.
    start, stop : int
        Global rows, ``stop`` exclusive.
    """
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop))
    cuts = [(n, *offsets[n : n + 2].tolist()) for n in range(first, min(last, len(offsets) - 1))]
    pieces = [Piece(n, max(start, low) - low, min(stop, high) - low) for n, low, high in cuts]
    return [piece for piece in pieces if piece.start < piece.stop]


class Features:
    """The rows of one or more shards.

    Attributes
    ----------
    shards : tuple of Shard
    offsets : (shards + 1,) int64
        Global row of each shard's first row, then the number of rows.
    rows, dim : int
    dtype : numpy.dtype
        The widest type among the shards; narrower ones are widened, which is exact.
    """

    def __init__(self, shards: Sequence[Shard], folders: Sequence[Path] = ()) -> None:
        self.shards, self.folders = tuple(shards), tuple(folders)
        sizes = np.array([shard.rows for shard in shards], np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self.rows = int(self.offsets[-1])
        if not self.rows:
            names = ", ".join(str(shard.path) for shard in shards[:3])
            raise SnipError(f"no rows at all in {names}; expected at least one feature")
        filled = [shard for shard in shards if shard.rows]
        self.dim = filled[0].dim
        for shard in shards:
            if shard.dim != self.dim and (shard.rows or shard.dim):
                raise SnipError(
                    f"{shard.path}: rows are {shard.dim} wide, those of {filled[0].path} are "
                    f"{self.dim}; shards of one set have one width"
                )
        self.dtype = np.result_type(*(shard.dtype for shard in filled))
        self.opened = identities(self.paths())

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return global rows ``start`` to ``stop`` (exclusive): (n, dim) `dtype`.

        ``out``, (>= n, dim) of `dtype`, is memory for them; else they get their own.
        """
        stop = min(stop, self.rows)
        rows = np.empty((stop - start, self.dim), self.dtype) if out is None else out
        rows = rows[: stop - start]
        for piece, place in self._pieces(start, stop):
            self.shards[piece.shard].read_into(piece.start, piece.stop, rows[place])
        return rows

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Piece, slice]]:
        """Yield the pieces of rows ``start`` to ``stop``, and the place of each among them."""
        for piece in plan_pieces(self.offsets, start, stop):
            first = int(self.offsets[piece.shard]) - start
            yield piece, slice(first + piece.start, first + piece.stop)

    def checksums(
        self, start: int, rows: np.ndarray, hashes: np.ndarray | None = None
    ) -> list[tuple[int, int]]:
        """Return the checksum of each shard's part of the rows from global row ``start`` on.

        ``hashes`` saves making them; see `hashing.sum_checksums`.
        """
        found = []
        for piece, place in self._pieces(start, start + len(rows)):
            dtype = self.shards[piece.shard].dtype
            if hashes is not None and dtype == self.dtype:
                own = hashes[place]
            else:  # hashes of rows as the shard stores them, whatever the other shards do
                own = row_hashes(rows[place].astype(dtype, copy=False))
            found.append((piece.shard, rows_checksum(own, piece.start)))
        return found

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the given global rows, in the order asked, read in row order.

        Parameters
        ----------
        rows : (n,) int64
            Global row numbers, any order, repeats allowed.
        """
        if (rows[1:] > rows[:-1]).all():
            return self.gather_ascending(rows)
        wanted, back = np.unique(rows, return_inverse=True)
        return self.gather_ascending(wanted)[back]

    def gather_ascending(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the given global rows, (n,) int64 strictly ascending.

        ``out``, (>= n, dim) of `dtype`, is memory for them; else they get their own.
        """
        found = np.empty((len(rows), self.dim), self.dtype) if out is None else out[: len(rows)]
        cuts = np.searchsorted(rows, self.offsets)
        for shard in np.flatnonzero(np.diff(cuts)):
            part = slice(cuts[shard], cuts[shard + 1])
            self.shards[shard].take_into(rows[part] - self.offsets[shard], found[part])
        return found

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) in row order, ``size`` rows at a time."""
        for start, stop in plan_blocks(self.rows, size):
            yield start, self.read(start, stop)

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file and the row in it of a global row, for messages."""
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.shards[shard].path, int(row - self.offsets[shard])

    def paths(self) -> list[Path]:
        """Return the files, in shard order; none for arrays in memory."""
        return [s.path for s in self.shards if not isinstance(s, ArrayShard)]

    def inputs(self) -> list[Path]:
        """Return the folders that were named as input, and the files."""
        return [*self.folders, *self.paths()]

    def describe(self) -> list[dict[str, Any]]:
        """Return name, size, rows and dtype of each shard, as manifests hold them."""
        return [
            {"name": s.path.name, "size": s.size(), "rows": s.rows, "dtype": str(s.dtype)}
            for s in self.shards
        ]

    def refuse_changed(self) -> None:
        """Refuse files that changed since they were opened; see `refuse_changed`."""
        refuse_changed(self.paths(), self.opened)


def identities(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Return what tells files from what they are when they were changed or replaced."""
    found = [path.stat() for path in paths]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def refuse_changed(paths: Sequence[Path], opened: Sequence[tuple[int, int, int]]) -> None:
    """Refuse files that changed since they were opened: what was read is a mixture.

    Raises
    ------
    InputError
        Names the first.
    """
    elsewhere = [path for path in paths if isinstance(path, RemotePath)]
    for item in elsewhere:
        item.forget_version()
    map_requests(RemotePath.is_file, elsewhere)
    for path, before in zip(paths, opened, strict=True):
        if not path.is_file() or identities([path]) != [before]:
            raise InputError(f"{path}: changed while it was read; run it again")


def request_of(features: Features) -> dict[str, Any]:
    """Return what tells features from others, as the entries of a request (`out_folder.claim`)."""
    changed = [shard.changed() for shard in features.shards]
    return {"features": features.describe(), "features_changed": changed}


def accept_dates(request: dict[str, Any], features: Features, finished: dict[str, Any]) -> None:
    """Put a finished run's dates into a request where shards hold the same bytes as then.

    Parameters
    ----------
    request : dict
        With the entries of `request_of`; changed in place.
    features : Features
        May have more shards than the finished run had.
    finished : dict
        Its manifest. A shard without ``checksum`` there is never taken for the same.
    """
    stamps, dates = request["features_changed"], finished["request"].get("features_changed", [])
    earlier = zip(dates, finished["request"].get("features", []), finished["shards"], strict=False)
    for number, (date, described, shard) in enumerate(earlier):
        if number >= len(stamps) or stamps[number] == date or "checksum" not in shard:
            continue
        own = features.shards[number]
        if request["features"][number] == described and not isinstance(own, ArrayShard):
            same = checksum_text(shard_checksum(own)) == shard["checksum"]
            stamps[number] = date if same else stamps[number]


def open_features(
    source: Any, *, parts: str | None = None, array: str | None = None, column: str | None = None
) -> Features:
    """Open features: an array, arrays, or paths as the command line takes them.

    Parameters
    ----------
    source : (n, d) array, path, or a sequence of either
        An array is numpy's, or what numpy can view as one without a copy, such as a tensor in the
        CPU's memory. A path is a folder (not recursive), a glob, a file, or a ``{part:04d}``
        pattern; or a URL of one of these, see `snipdedup.storage.listing`.
    parts : str, optional
        Part numbers for a pattern, ``"0:2"``, end exclusive.
    array, column : str, optional
        Which array of an ``.npz``, which list column of a parquet file.

    Raises
    ------
    SnipError
        If there is no shard, or one is not what features look like; the file is named.
    UsageError
        If it is neither an array nor a path.
    """
    if isinstance(source, Features):
        return source
    shards: list[Shard] = []
    folders: list[Path] = []
    single = as_array(source) is not None or isinstance(source, str | Path)
    if not single and (not isinstance(source, Iterable) or isinstance(source, dict | bytes)):
        raise no_features(source)
    for number, item in enumerate([source] if single else source):
        part = as_array(item)
        if part is not None:
            shards.append(ArrayShard(part, "array" if single else f"array {number}"))
        elif not isinstance(item, str | Path):
            raise no_features(item, f" in {type(source).__qualname__}")
        elif is_remote(item):
            open_one = partial(open_shard, array=array, column=column)
            shards += map_requests(open_one, find_shards(item, parts))
        else:
            shards += [open_shard(p, array, column) for p in find_shards(item, parts)]
            folders += [folder for folder in [Path(item).expanduser()] if folder.is_dir()]
    return Features(shards, folders)


def open_shard(path: Path, array: str | None = None, column: str | None = None) -> Shard:
    """Open one file of rows.

    Parameters
    ----------
    path : Path
        A ``.npy``, ``.npz`` or ``.parquet`` file.
    array : str, optional
        Which array of an ``.npz``; needed where it holds several.
    column : str, optional
        Which list column of a parquet file; likewise.

    Raises
    ------
    InputError
        If the file is empty, truncated, not 2-D, not floating point, or Fortran-ordered.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: empty file, expected rows of features; fetch or write it again")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return NpyShard(path)
    if suffix == ".npz":
        return open_npz(path, array)
    if suffix == ".parquet":
        return ParquetShard(path, column)
    raise InputError(f"{path}: expected a file of type {', '.join(SUFFIXES)}")


def as_array(given: Any) -> np.ndarray | None:
    """Return what numpy can view as an array without a copy, None of anything else.

    Raises
    ------
    UsageError
        If it is a tensor that numpy cannot view: on another device, or bfloat16; or a masked
        array, whose mask would go unseen.
    """
    if isinstance(given, np.ma.MaskedArray):
        raise UsageError("features have no mask, found a masked array; give its rows that count")
    if isinstance(given, np.ndarray):
        return given
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        try:
            return np.asarray(given.detach().numpy())
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"a {given.dtype} tensor on {given.device} is no numpy array; give "
                "tensor.detach().float().cpu()"
            ) from error
    return np.asarray(given) if hasattr(given, "__array_interface__") else None


def no_features(given: Any, within: str = "") -> UsageError:
    """Return the refusal of what is neither an array nor a path."""
    kind = type(given)
    what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return UsageError(
        "features are a 2-D array of floats (numpy, or a torch tensor in the CPU's memory), a "
        f"path, or a sequence of either; found {what}{within}; for rows as lists, a table or an "
        "Arrow array give numpy.array(rows, numpy.float32)"
    )


def find_shards(spec: str | Path, parts: str | None = None) -> list[Path]:
    """Return the files that a FEATURES argument means, in shard order.

    Raises
    ------
    SnipError
        If nothing matches, or a folder mixes image and text features.
    UsageError
        If ``--parts`` and the pattern do not go together.
    """
    text = spec.url if isinstance(spec, RemotePath) else str(spec)
    numbers = part_numbers(text, parts)
    found = find_files(text, numbers, SUFFIXES, "no shard found")
    if numbers is not None:
        return found
    refuse_mixture(found, redacted(text))
    return natural_sort(found)


def implied_metadata(spec: str | Path) -> Path | None:
    """Return the ``metadata/`` beside ``img_emb/`` where a folder stands for both."""
    return metadata_beside(str(spec), SUFFIXES)


def part_numbers(pattern: str, parts: str | None) -> tuple[int, int] | None:
    """Return (0, 2) of ``"0:2"``; None where there is neither a ``{part}`` nor such numbers.

    Raises
    ------
    UsageError
        If there is only one of them, or the numbers are none.
    """
    if "{part" not in pattern:
        if parts is not None:
            found = redacted(pattern)
            raise UsageError(f"--parts needs a pattern such as img_{{part:04d}}.npy, found {found}")
        return None
    match = re.fullmatch(r"(\d+):(\d+)", parts or "")
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(
            f"{redacted(pattern)} needs --parts START:END, end exclusive, found {parts!r}"
        )
    if int(match[2]) > MOST_FILES:
        raise UsageError(f"--parts {parts}: numbers of files go up to {MOST_FILES:,}")
    return int(match[1]), int(match[2])


def natural_key(path: Path) -> tuple[Any, ...]:
    """Sort key by name with numbers as numbers, then by the whole path."""

    def split(text: str) -> list[tuple[int, int, str]]:
        return [
            (0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in re.split(r"([0-9]+)", text)
            if part
        ]

    return (split(path.name), split(str(path)), str(path))


def natural_sort(paths: Any) -> list[Path]:
    """Return paths in natural order: ``img_emb_2`` before ``img_emb_10``."""
    return sorted(paths, key=natural_key)


def refuse_mixture(paths: Sequence[Path], where: str) -> None:
    """Refuse files that are image features and text features side by side."""
    words = {p: set(re.split(r"[^a-z]+", p.stem.lower())) for p in paths}
    image = [p for p in paths if words[p] & IMAGE_WORDS]
    text = [p for p in paths if words[p] & TEXT_WORDS and p not in image]
    if image and text:
        raise SnipError(
            f"{where} mixes image and text features ({image[0].name}, {text[0].name}); name one "
            f"set, for example '{image[0].parent / (image[0].stem.rstrip('0123456789') + '*')}'"
        )
