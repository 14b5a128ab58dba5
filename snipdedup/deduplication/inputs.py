"""What a run reads: FEATURES, second features, reference rows, and the metadata table.

Everything is opened and checked before the search. A reference is other features, or an earlier
OUT: its kept rows, and before them its own references. Its rows are never removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup.deduplication.second_features import SecondFeatures, open_seconds, recorded_seconds
from snipdedup.errors import SnipError
from snipdedup.features.formats import RowSet, Shard
from snipdedup.features.hashing import checksum_text, find_shared
from snipdedup.features.shards import (
    Features,
    accept_dates,
    find_shards,
    implied_metadata,
    open_features,
    parts_for,
    request_of,
)
from snipdedup.groups.pairs import Also
from snipdedup.metadata.tables import Metadata, Table, find_metadata, open_metadata
from snipdedup.storage import atomic, locks
from snipdedup.storage.external_sort import among
from snipdedup.storage.out_folder import MANIFEST, as_written, is_finished, read_manifest, versions
from snipdedup.storage.remote import absolute_location, is_remote

KIND = "dedup"  # of the manifest of an OUT


@dataclass(frozen=True)
class Inputs:
    """What is compared; ``features`` is None where an index alone is given."""

    features: Features | None
    seconds: tuple[SecondFeatures, ...] = ()
    references: References | None = None

    @property
    def also(self) -> tuple[Also, ...]:
        """What a pair must match in besides."""
        return tuple(second.also for second in self.seconds)

    def compared(self) -> list[Features]:
        """Return FEATURES, where they are given, and the second features."""
        first = [] if self.features is None else [self.features]
        return [*first, *(second.features for second in self.seconds)]

    def refuse_changed(self) -> None:
        """Refuse inputs that changed since they were opened."""
        references = [] if self.references is None else [self.references.features]
        for source in (*self.compared(), *references):
            source.refuse_changed()

    def paths(self) -> list[Path]:
        """Return the files and folders that are read."""
        paths = [] if self.references is None else self.references.inputs()
        return [*(path for source in self.compared() for path in source.inputs()), *paths]


class SelectedShard(Shard):
    """Some rows of another shard, in its order."""

    def __init__(self, shard: Shard, rows: np.ndarray) -> None:
        super().__init__(shard.path, (len(rows), shard.dim), shard.dtype)
        self.shard, self.selected = shard, rows

    def read_into(self, rows: RowSet, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        self.shard.read_into(self.selected[rows], out)


@dataclass(frozen=True)
class Reference:
    """One input of reference rows: features, or the features of an earlier OUT."""

    name: str  # as it was given; the name in tables
    path: str | None  # None for an array
    features: Features  # all its rows
    kept: np.ndarray  # (n,) int64: those of its rows that are reference rows
    mask: str | None = None  # SHA-256 of the mask of an earlier OUT; None for features
    checksums: list[int] | None = None  # of each shard, where an earlier run computed them

    def shards(self) -> list[Shard]:
        """Return its shards, cut down to the reference rows."""
        offsets = self.features.offsets
        cuts = np.searchsorted(self.kept, offsets)
        return [
            shard if high - low == shard.rows else SelectedShard(shard, self.kept[low:high] - first)
            for shard, low, high, first in zip(
                self.features.shards, cuts[:-1], cuts[1:], offsets[:-1], strict=True
            )
        ]

    def request(self) -> dict[str, Any]:
        """Return what tells it from another input."""
        return {**request_of(self.features), "mask": self.mask}

    def identity(self) -> tuple[str, bool]:
        """Return what is the same for two names of one input."""
        if self.path is None or is_remote(self.path):
            return self.path or self.name, self.mask is None
        return os.path.realpath(self.path), self.mask is None


class References:
    """Reference rows of several inputs, ``features``, numbered one after another.

    ``starts``, (items + 1,) int64, has the number of each input's first row, then how many there
    are.
    """

    def __init__(self, items: Sequence[Reference]) -> None:
        self.items = list(items)
        sizes = [len(item.kept) for item in self.items]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.rows = int(self.starts[-1])
        self.features = Features([shard for item in self.items for shard in item.shards()])

    def refuse_shared(self, features: Features) -> None:
        """Refuse features that share a shard with a reference: all its rows would be removed.

        References of earlier runs count too, and shards without a reference row.
        """
        known = [(item.name, shard) for item in self.items for shard in item.features.shards]
        shared = find_shared(features.shards, [shard for _, shard in known])
        if shared is None:
            return
        name, other = known[shared.other]
        raise SnipError(
            f"{features.shards[shared.own].path} of FEATURES "
            f"{'equals' if shared.copied else 'is'} {other.path} of --reference {name}, so all its "
            "rows would be removed; name as FEATURES what the reference does not hold"
        )

    def before(self, features: Features) -> Features:
        """Return the reference rows and then these as one list of rows."""
        if features.dim != self.features.dim:
            raise SnipError(
                f"--reference {self.items[0].name}: its rows are {self.features.dim} wide, those "
                f"of FEATURES are {features.dim}; compare features of one model"
            )
        return Features([*self.features.shards, *features.shards])

    def locate(self, numbers: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """Return the name of the input of each reference row, and its row there."""
        item = np.searchsorted(self.starts, numbers, side="right") - 1
        row = np.empty(len(numbers), np.int64)
        for which in np.unique(item):
            at = item == which
            row[at] = self.items[which].kept[numbers[at] - self.starts[which]]
        return pa.array([item.name for item in self.items], pa.string()).take(pa.array(item)), row

    def numbers_of(self, called: Sequence[str], names: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of rows by the names of their inputs, the reverse of `locate`.

        ``called`` is what each input was called then, in order; ``names`` and ``rows``, (n,).
        """
        numbers = np.full(len(rows), -1)
        for which, (name, item) in enumerate(zip(called, self.items, strict=False)):
            at = np.flatnonzero(names == name)
            at = at[among(item.kept, rows[at])]
            numbers[at] = np.searchsorted(item.kept, rows[at]) + self.starts[which]
        wrong = np.flatnonzero(numbers < 0)
        if len(wrong):
            raise SnipError(
                f"row {rows[wrong[0]]:,} of {names[wrong[0]]} is not a kept row of a --reference; "
                "search again"
            )
        return numbers

    def inputs(self) -> list[Path]:
        """Return the folders and files that are read."""
        folders = [Path(item.path) for item in self.items if item.mask and item.path]
        return folders + [path for item in self.items for path in item.features.inputs()]

    def describe(self, checksums: Sequence[int]) -> list[dict[str, Any]]:
        """Return the manifest's entry of each input; ``checksums`` are those of all shards."""
        read, entries = iter(checksums), []
        for item, start in zip(self.items, self.starts, strict=False):
            own = list(islice(read, len(item.features.shards)))
            entries.append({
                "name": item.name,
                "kind": "features" if item.mask is None else KIND,
                "path": item.path,
                "files": [str(path.absolute()) for path in item.features.paths()],
                "rows": item.features.rows,
                "staying": len(item.kept),
                "first": int(start),
                "request": item.request(),
                "shards": describe_shards(item.features, item.checksums or own),
            })  # fmt: skip
        return entries

    def kept_model(self, rows: int, **settings: Any) -> Path | None:
        """Return the model of the join that an earlier run kept, where it suits this one.

        That run must have had the same settings and libraries, and no fewer than ``rows`` rows: its
        lists were fitted to them.
        """
        for item in self.items:
            if item.mask is None or item.path is None or item.features.rows < rows:
                continue
            manifest = read_manifest(Path(item.path), KIND)
            path = Path(item.path) / locks.WORK / "model.npz"
            same = all(manifest["settings"][name] == settings[name] for name in settings)
            if same and manifest["versions"] == versions() and path.is_file():
                return path
        return None


def open_reference_rows(given: Any, **how: str | None) -> References:
    """Open what ``--reference`` names, and the references of earlier runs among it.

    ``given`` is a path, an array, or a list of them: features, or folders that ``snip dedup``
    wrote; in a str several by comma. ``how`` is ``array`` and ``column`` of `open_features`.
    """
    items: dict[Any, Reference] = {}
    for number, source in enumerate(split_sources(given)):
        for item in open_one(source, number, how):
            items.setdefault(item.identity(), item)
    return References(list(items.values()))


def split_sources(given: Any) -> list[Any]:
    """Return the inputs that ``--reference`` names."""
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",") if part.strip()]
        return [given] if Path(given).expanduser().exists() else parts
    return list(given) if isinstance(given, list | tuple) else [given]


def open_one(source: Any, number: int, how: dict[str, Any]) -> Iterator[Reference]:
    """Yield the references of one input: its own first, where it is an earlier OUT."""
    name, path = f"reference {number}", None
    if isinstance(source, str | Path):
        name, path = str(source), absolute_location(source)
        if is_finished(Path(path)):
            yield from open_earlier(Path(path), name)
            return
        if (Path(path) / locks.WORK / locks.REQUEST).is_file():
            raise SnipError(f"--reference {name} is of a run that was stopped; finish it first")
    features = open_features(source, **how)
    yield Reference(name, path, features, np.arange(features.rows))


def open_earlier(folder: Path, name: str) -> Iterator[Reference]:
    """Yield the references of a finished run, then its kept rows."""
    manifest = read_manifest(folder, KIND)
    settings = manifest["settings"]
    if settings["features"] is None or not manifest["verified"]:
        raise SnipError(f"{folder} names no features on disk, so it cannot be a --reference")
    how = {key: settings[key] for key in ("parts", "array", "column")}
    for entry in manifest.get("references", []):
        yield open_listed(folder, entry, how)
    features = open_searched(folder, settings["features"], manifest, how)
    mask = atomic.sha256(folder / "is_dup.npy")
    if mask != manifest["outputs"]["is_dup.npy"]["sha256"]:
        raise SnipError(f"{folder / 'is_dup.npy'} is not what the run wrote; make it anew")
    with as_written(folder):
        kept = ~np.load(folder / "is_dup.npy")
        if (folder / "bad_rows.parquet").is_file():
            kept[pq.read_table(folder / "bad_rows.parquet")["row"].to_numpy()] = False
    kept_rows = np.flatnonzero(kept)
    yield Reference(name, str(folder), features, kept_rows, mask, known_checksums(manifest))


def open_listed(folder: Path, entry: dict[str, Any], how: dict[str, Any]) -> Reference:
    """Return a reference that a finished run lists, which must be what it was then."""
    path = entry["path"]
    if path is None:
        raise SnipError(f"{folder}: its reference was an array, which no later run can read")
    if entry["kind"] == KIND:
        *_, item = open_earlier(Path(path), path)
    else:
        features = open_searched(folder, path, entry, {**how, "parts": None})
        every = np.arange(features.rows)
        item = Reference(path, path, features, every, None, known_checksums(entry))
    if item.mask != entry["request"]["mask"]:
        raise SnipError(f"{folder}: its reference {path} was made anew since; make it anew too")
    return item


def open_searched(
    folder: Path, source: str, manifest: dict[str, Any], how: dict[str, Any]
) -> Features:
    """Open the features that a finished run read, unchanged since."""
    try:
        features = open_features(source, **how)
    except SnipError as error:
        raise SnipError(
            f"{folder} was made from features that cannot be read now: {error}"
        ) from error
    check_searched(folder, features, manifest)
    return features


def check_searched(folder: Path, features: Features, manifest: dict[str, Any]) -> None:
    """Refuse features that are not those a finished run searched.

    ``manifest``, with ``request`` and ``shards``, is the run's, or its entry of a reference.
    """
    now, then = request_of(features), manifest["request"]
    accept_dates(now, features, manifest)
    if len(manifest["shards"]) != len(then["features"]):
        raise SnipError(f"{folder / MANIFEST}: damaged: it names other shards in two places")
    shards, before = (
        zip(side["features"], side["features_changed"], strict=True) for side in (now, then)
    )
    for shard, known in zip_longest(shards, before):
        if shard != known:
            raise SnipError(
                f"{folder}: the features are not those that were searched "
                f"({(shard or known)[0]['name']} differs); search again"
            )


def known_checksums(entry: dict[str, Any]) -> list[int]:
    """Return the checksums of the shards of a manifest, or of one of its inputs."""
    return [int(shard["checksum"], 16) for shard in entry["shards"]]


def describe_shards(features: Features, checksums: Sequence[int]) -> list[dict[str, Any]]:
    """Return what a manifest holds of shards, with the checksums of their rows."""
    return [
        {**shard, "checksum": checksum_text(checksum)}
        for shard, checksum in zip(features.describe(), checksums, strict=True)
    ]


def open_inputs(
    features: Any, *, parts: str | None = None, array: str | None = None,
    column: str | None = None, seconds: Sequence[tuple[Any, float]] = (), reference: Any = None,
) -> Inputs:  # fmt: skip
    """Open what the settings name; refuse what does not go with FEATURES.

    ``seconds`` are second features, each with its threshold.
    """
    if features is None:
        return Inputs(None)
    opened = open_features(features, parts=parts, array=array, column=column)
    also, references = open_seconds(seconds, opened, parts, array=array, column=column), None
    if reference is not None:
        references = open_reference_rows(reference, array=array, column=column)
        references.refuse_shared(opened)  # now, not after the search
        references.before(opened)
    return Inputs(opened, also, references)


def open_metadata_of(
    metadata: str | None, source: Any, features: Features | None, index: str | None
) -> Metadata | None:
    """Open META, or the metadata beside or in ``source``; check its rows against its features."""
    if metadata is None and isinstance(source, str | Path):
        implied = implied_metadata(source)
        metadata = None if implied is None else str(implied)
    if metadata is not None:
        table = open_metadata(metadata)
    elif features is not None and features.tables is not None:
        table = Metadata([Table(path) for path in features.tables])
    else:
        return None
    if features is None:
        shards = read_manifest(Path(str(index)).expanduser(), "index")["shards"]
    else:
        shards = [{"name": str(shard.path), "rows": shard.rows} for shard in features.shards]
    table.check_matches(shards)
    return table


def named_paths(manifest: dict[str, Any]) -> Iterator[Path]:
    """Yield the folders and files that a finished run read, where they still are."""
    settings = manifest.get("settings", {})
    parts = settings.get("parts")
    sources = {name: settings.get(name) or [] for name in ("features", "reference", "metadata")}
    also = [entry["source"] for entry in recorded_seconds(manifest)]
    for name, named in {**sources, "also": also}.items():
        for source in named if isinstance(named, list) else [named]:
            with suppress(SnipError, OSError):
                if not isinstance(source, str) or is_remote(source):
                    continue
                if Path(source).is_dir():
                    yield Path(source)
                if name == "metadata":
                    yield from find_metadata(source)
                else:
                    yield from find_shards(source, parts_for(source, parts))
