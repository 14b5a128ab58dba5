"""Features: the rows of shards, one after another; which files they are, and in which order.

A row number is global: the shard's offset plus the place in the shard.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.commands import MOST_FILES
from snipdedup.errors import InputError, InputTypeError, SnipError, UsageError
from snipdedup.features.formats import SUFFIXES, ArrayShard, Shard, identity_of, open_shard
from snipdedup.features.hashing import checksum_text, row_hashes, rows_checksum, shard_checksum
from snipdedup.features.staging import (
    OPENERS,
    StagedShard,
    is_table,
    plain,
    stage_file,
    stage_table,
)
from snipdedup.storage.listing import find_files, metadata_beside
from snipdedup.storage.remote import RemotePath, is_remote, map_requests
from snipdedup.storage.web import PART, redacted

IMAGE_WORDS = {"img", "image", "images", "vision", "visual"}
TEXT_WORDS = {"txt", "text", "texts", "caption", "captions", "title"}


def plan_blocks(rows: int, size: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into blocks (start, stop) of ``size``, aligned to global row 0."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def plan_pieces(offsets: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the pieces of shards that make up global rows ``start`` to ``stop`` (exclusive).

    A piece is a shard's number, the rows in it, and their places from ``start`` on. ``offsets``,
    (shards + 1,) int64, are as in `Features`.
    """
    cuts = np.clip(offsets, start, stop)
    for shard in np.flatnonzero(np.diff(cuts)).tolist():
        first, low, high = int(offsets[shard]), int(cuts[shard]), int(cuts[shard + 1])
        yield shard, slice(low - first, high - first), slice(low - start, high - start)


class FileRows:
    """The rows of files, one after another, and the files as they were when they were opened.

    ``offsets``, (files + 1,) int64, are the global row of each file's first row, then the number of
    rows. Arrays in memory have rows, but no path. ``folders`` are those that were named as input.
    """

    def __init__(
        self, paths: Sequence[Path], sizes: Sequence[int], folders: Sequence[Path] = ()
    ) -> None:
        self._paths, self.folders = list(paths), tuple(folders)
        self._identities = [identity_of(path) for path in paths]
        self.offsets = np.cumsum([0, *sizes], dtype=np.int64)
        self.rows = int(self.offsets[-1])

    def paths(self) -> list[Path]:
        """Return the paths of the files, in order."""
        return list(self._paths)

    def inputs(self) -> list[Path]:
        """Return the folders that were named as input, and the files."""
        return [*self.folders, *self._paths]

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of the file that holds a global row, and the row in it."""
        number = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return number, int(row - self.offsets[number])

    def refuse_changed(self) -> None:
        """Refuse a file that changed since then with `InputError`: what was read is a mixture."""
        urls = [path for path in self._paths if isinstance(path, RemotePath)]
        for url in urls:
            url.forget_version()
        map_requests(RemotePath.is_file, urls)
        for path, before in zip(self._paths, self._identities, strict=True):
            if not path.is_file() or identity_of(path) != before:
                raise InputError(f"{path}: changed while it was read; run it again")


class Features(FileRows):
    """The rows of one or more shards.

    ``dtype`` is the widest among the shards; narrower rows are widened, which is exact.
    """

    def __init__(self, shards: Sequence[Shard], folders: Sequence[Path] = ()) -> None:
        self.shards = tuple(shards)
        paths = [shard.path for shard in shards if not isinstance(shard, ArrayShard)]
        super().__init__(paths, [shard.rows for shard in shards], folders)
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

    @property
    def tables(self) -> list[Path] | None:
        """The metadata that came with the rows, a file for each shard; None where any has none."""
        found = [one.metadata for one in self.shards if isinstance(one, StagedShard)]
        named = [path for path in found if path is not None]
        return named if len(named) == len(self.shards) else None

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return global rows ``start`` to ``stop`` (exclusive): (n, dim) `dtype`.

        ``out``, (>= n, dim) of `dtype`, is memory for them; else they get their own.
        """
        stop = min(stop, self.rows)
        found = np.empty((stop - start, self.dim), self.dtype) if out is None else out
        found = found[: stop - start]
        for shard, rows, places in plan_pieces(self.offsets, start, stop):
            self.shards[shard].read_into(rows, found[places])
        return found

    def checksums(
        self, start: int, rows: np.ndarray, hashes: np.ndarray | None = None
    ) -> list[tuple[int, int]]:
        """Return the checksum of each shard's part of the rows from global row ``start`` on.

        ``hashes`` saves making them; see `hashing.sum_checksums`.
        """
        found = []
        for shard, own_rows, places in plan_pieces(self.offsets, start, start + len(rows)):
            dtype = self.shards[shard].dtype
            if hashes is not None and dtype == self.dtype:
                own = hashes[places]
            else:  # hashes of rows as the shard stores them, whatever the other shards do
                own = row_hashes(rows[places].astype(dtype, copy=False))
            found.append((shard, rows_checksum(own, own_rows.start)))
        return found

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return global rows, (n,) int64 in any order, repeats allowed; they are read in order."""
        if (rows[1:] > rows[:-1]).all():
            return self.gather_ascending(rows)
        wanted, back = np.unique(rows, return_inverse=True)
        return self.gather_ascending(wanted)[back]

    def gather_ascending(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return global rows, (n,) int64 strictly ascending; ``out`` as in `read`."""
        found = np.empty((len(rows), self.dim), self.dtype) if out is None else out[: len(rows)]
        cuts = np.searchsorted(rows, self.offsets)
        for shard in np.flatnonzero(np.diff(cuts)):
            part = slice(cuts[shard], cuts[shard + 1])
            self.shards[shard].read_into(rows[part] - self.offsets[shard], found[part])
        return found

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) in row order, ``size`` rows at a time."""
        for start, stop in plan_blocks(self.rows, size):
            yield start, self.read(start, stop)

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file and the row in it of a global row, for messages."""
        shard, own = self.locate(row)
        return self.shards[shard].path, own

    def describe(self) -> list[dict[str, Any]]:
        """Return name, size, rows and dtype of each shard, as manifests hold them."""
        return [
            {"name": s.path.name, "size": s.size(), "rows": s.rows, "dtype": str(s.dtype)}
            for s in self.shards
        ]


def request_of(features: Features) -> dict[str, Any]:
    """Return what tells features from others, as the entries of a request (`out_folder.claim`)."""
    changed = [shard.changed() for shard in features.shards]
    return {"features": features.describe(), "features_changed": changed}


def accept_dates(request: dict[str, Any], features: Features, finished: dict[str, Any]) -> None:
    """Put a finished run's dates into a request where shards hold the same bytes as then.

    ``request`` has the entries of `request_of`; it is changed in place. ``features`` may have more
    shards than the run of the manifest ``finished``. A shard that has no ``checksum`` there is
    never taken for the same.
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
    """Open features: an array, a table, paths as the command line takes them, or several of these.

    An array is 2-D: numpy's, or what offers ``__array__`` or DLPack, such as a tensor; it is not
    copied where numpy can view it. A table is copied to temporary files, see `staging`. A path is a
    folder (not recursive), a glob, a file, or a ``{part:04d}`` pattern, with the numbers ``parts``
    such as ``"0:2"``; or a URL of one of these, see `snipdedup.storage.listing`. ``array`` names an
    array of a file of several, ``column`` a list column of a table or a parquet file.
    """
    if isinstance(source, Features):
        return source
    shards: list[Shard] = []
    folders: list[Path] = []
    single = is_one(source)
    if not single and (not isinstance(source, Iterable) or isinstance(source, dict | bytes)):
        raise no_features(source)
    for number, item in enumerate([source] if single else source):
        called = "" if single else f" {number}"
        if isinstance(item, str | Path):
            paths = find_shards(item, parts)
            open_one = partial(open_path, array=array, column=column)
            shards += map_requests(open_one, paths) if is_remote(item) else map(open_one, paths)
            folders += [folder for folder in [Path(item).expanduser()] if folder.is_dir()]
        elif is_table(item):
            shards.append(stage_table(item, column, f"table{called}"))
        elif is_one(item):
            shards.append(ArrayShard(as_array(item), f"array{called}"))
        else:
            raise no_features(item, f" in {type(source).__qualname__}")
    return Features(shards, folders)


def open_path(path: Path, array: str | None, column: str | None) -> Shard:
    """Open a file in place, or by a copy where another library must read it."""
    if path.suffix.lower() in OPENERS and not isinstance(path, RemotePath):
        return stage_file(path, array, column)
    return open_shard(path, array=array, column=column)


def is_one(given: Any) -> bool:
    """Tell a path, a table or an array from a sequence of them."""
    ways = ("__array_interface__", "__array__", "__dlpack__")
    return isinstance(given, str | Path) or is_table(given) or any(hasattr(given, w) for w in ways)


def as_array(given: Any) -> np.ndarray:
    """Return an array of another library as numpy's; a copy if it lies on another device.

    A masked array is refused: its mask would go unseen.
    """
    masked = sys.modules.get("numpy.ma")  # where it is not loaded, there is none
    if masked is not None and isinstance(given, masked.MaskedArray):
        raise UsageError("features have no mask, found a masked array; give its rows that count")
    if isinstance(given, np.ndarray):
        return given
    try:
        if hasattr(given, "__dlpack__") and not hasattr(given, "detach"):
            device = getattr(given, "__dlpack_device__", lambda: (1, 0))()[0]
            if device != 1 or not hasattr(given, "__array__"):  # 1: the memory of the CPU
                from torch.utils.dlpack import from_dlpack

                given = from_dlpack(given)
        return plain(given)
    except (RuntimeError, TypeError, BufferError, NotImplementedError) as error:
        raise no_features(given, f" that numpy cannot take ({error})") from error


def no_features(given: Any, within: str = "") -> UsageError:
    """Return the refusal of what is neither an array, a table nor a path."""
    kind = type(given)
    what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return InputTypeError(
        "features are a 2-D array of floats (numpy, torch, or what has __array__ or __dlpack__), a "
        "table with a column of lists (Arrow, pandas, polars, DuckDB, datasets, Lance), a path, or "
        f"a sequence of these; found {what}{within}; for rows as lists give "
        "numpy.array(rows, numpy.float32)"
    )


def source_name(source: Any) -> Any:
    """Return FEATURES as a manifest holds them: texts of paths, None of what was in memory."""
    several = isinstance(source, list | tuple)
    paths = all(isinstance(one, str | Path) for one in (source if several else [source]))
    if not paths:
        return None
    return [str(one) for one in source] if several else str(source)


def find_shards(spec: str | Path, parts: str | None = None) -> list[Path]:
    """Return the files that a FEATURES argument means, in shard order."""
    text = spec.url if isinstance(spec, RemotePath) else str(spec)
    numbers = part_numbers(text, parts)
    path = Path(text).expanduser()
    if path.suffix.lower() in OPENERS and path.is_dir():  # zarr and Lance
        return [path]
    found = find_files(text, numbers, SUFFIXES, "no shard found")
    if numbers is not None:
        return found
    words = {path: set(re.split(r"[^a-z]+", path.stem.lower())) for path in found}
    images = [path for path in found if words[path] & IMAGE_WORDS]
    texts = [path for path in found if words[path] & TEXT_WORDS and path not in images]
    if images and texts:
        image = images[0]
        raise SnipError(
            f"{redacted(text)} mixes image and text features ({image.name}, {texts[0].name}); name "
            f"one set, for example '{image.parent / (image.stem.rstrip('0123456789') + '*')}'"
        )
    return natural_sort(found)


def implied_metadata(spec: str | Path) -> Path | None:
    """Return the ``metadata/`` beside ``img_emb/`` where a folder stands for both."""
    return metadata_beside(str(spec), SUFFIXES)


def parts_for(source: Any, parts: str | None) -> str | None:
    """Return the numbers ``parts`` where a source is a pattern that needs them, else None."""
    return parts if isinstance(source, str | Path) and PART in str(source) else None


def part_numbers(pattern: str, parts: str | None) -> tuple[int, int] | None:
    """Return (0, 2) of ``"0:2"``; None where there is neither a ``{part}`` nor such numbers."""
    if PART not in pattern:
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


def natural_sort(paths: Iterable[Path]) -> list[Path]:
    """Return paths by name, then by the whole path, with numbers as numbers: 2 before 10."""
    return sorted(paths, key=lambda p: (natural_key(p.name), natural_key(str(p)), str(p)))


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Return what a text is sorted by where its numbers count as numbers."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"([0-9]+)", text)
        if part
    ]
