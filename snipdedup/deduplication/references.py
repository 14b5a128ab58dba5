"""Rows that come first: references, which FEATURES are compared with and which never go.

A reference is other features, or an earlier OUT: its rows that stay, and before them its own
references. The search runs over one list of rows, reference rows first; what it found is cut down
to FEATURES, of which each row keeps its nearest reference row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import Dedup
from snipdedup.errors import SnipError
from snipdedup.features.formats import Shard
from snipdedup.features.hashing import checksum_text
from snipdedup.features.same import find_shared
from snipdedup.features.shards import (
    Features,
    accept_dates,
    open_features,
    plan_blocks,
    request_of,
)
from snipdedup.groups.members import Nearest
from snipdedup.groups.nearest_reference import nearest_within, with_copies
from snipdedup.join.forest import BLOCK_EDGES, Edges, UnionFind, join_edges, make_edges
from snipdedup.storage import atomic, locks
from snipdedup.storage.external_sort import Columns, among
from snipdedup.storage.manifest import MANIFEST, as_written, is_finished, read_manifest, versions
from snipdedup.storage.remote import absolute_location, is_remote

KIND = "dedup"  # of the manifest of an OUT
FEATURES, EARLIER = "features", "dedup"


class SelectedShard(Shard):
    """Some rows of another shard, in its order."""

    def __init__(self, shard: Shard, rows: np.ndarray) -> None:
        super().__init__(shard.path, (len(rows), shard.dim), shard.dtype)
        self.shard, self.selected = shard, rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Shard.read`."""
        return self.shard.take(self.selected[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        return self.shard.take(self.selected[rows])


@dataclass(frozen=True)
class Reference:
    """One input of reference rows.

    Attributes
    ----------
    name : str
        As it was given; what tables call it.
    kind : str
        ``features``, or ``dedup`` for an earlier OUT.
    path : str or None
        Where it lies; None for an array.
    features : Features
        All its rows.
    live : (n,) int64
        The rows of it that stay.
    mask : str or None
        Of an earlier OUT, the SHA-256 of its mask.
    checksums : list of str, optional
        Checksum of each shard, where an earlier run took them.
    """

    name: str
    kind: str
    path: str | None
    features: Features
    live: np.ndarray
    mask: str | None = None
    checksums: list[str] | None = None

    def shards(self) -> list[Shard]:
        """Return its shards, cut down to the rows that stay."""
        offsets = self.features.offsets
        cuts = np.searchsorted(self.live, offsets)
        return [
            shard if high - low == shard.rows else SelectedShard(shard, self.live[low:high] - first)
            for shard, low, high, first in zip(
                self.features.shards, cuts[:-1], cuts[1:], offsets[:-1], strict=True
            )
        ]

    def request(self) -> dict[str, Any]:
        """Return what tells it from another input."""
        return {**request_of(self.features), "mask": self.mask}


class References:
    """Reference rows of several inputs, numbered one after another.

    Attributes
    ----------
    items : list of Reference
    starts : (items + 1,) int64
        Number of each input's first row, then how many there are.
    features : Features
        These rows.
    """

    def __init__(self, items: Sequence[Reference]) -> None:
        self.items = list(items)
        sizes = [len(item.live) for item in self.items]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.features = Features([shard for item in self.items for shard in item.shards()])

    @property
    def rows(self) -> int:
        """How many reference rows there are."""
        return int(self.starts[-1])

    def refuse_shared(self, features: Features) -> None:
        """Refuse features of which a shard is one of a reference's, or a copy: all of it would go.

        Those of the references that earlier runs had count too, and shards of which no row stays.
        """
        held = [(item.name, shard) for item in self.items for shard in item.features.shards]
        shared = find_shared(features.shards, [shard for _, shard in held])
        if shared is None:
            return
        name, other = held[shared.other]
        said = "equals" if shared.copied else "is"
        raise SnipError(
            f"{features.shards[shared.own].path} of FEATURES {said} {other.path} of --reference "
            f"{name}, so all its rows would go; name as FEATURES what the reference does not hold"
        )

    def before(self, features: Features) -> Features:
        """Return the reference rows and then these as one list of rows."""
        if features.dim != self.features.dim:
            raise SnipError(
                f"--reference {self.items[0].name}: its rows are {self.features.dim} wide, those "
                f"of FEATURES are {features.dim}; compare features of one model"
            )
        return Features([*self.features.shards, *features.shards])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which input each reference row is of, and its row there."""
        item = np.searchsorted(self.starts, numbers, side="right") - 1
        row = np.empty(len(numbers), np.int64)
        for which in np.unique(item):
            at = item == which
            row[at] = self.items[which].live[numbers[at] - self.starts[which]]
        return item, row

    def find(self, called: Sequence[str], names: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of rows by the names of their inputs: what `locate` undoes.

        Parameters
        ----------
        called : sequence of str
            What each input was called then, in their order.
        names, rows : (n,)

        Raises
        ------
        SnipError
            If a row is none that stays in one of these inputs.
        """
        numbers = np.full(len(rows), -1)
        for which, (name, item) in enumerate(zip(called, self.items, strict=False)):
            at = np.flatnonzero(names == name)
            at = at[among(item.live, rows[at])]
            numbers[at] = np.searchsorted(item.live, rows[at]) + self.starts[which]
        wrong = np.flatnonzero(numbers < 0)
        if len(wrong):
            raise SnipError(
                f"row {rows[wrong[0]]:,} of {names[wrong[0]]} is no row of a --reference that "
                "stays there; search again"
            )
        return numbers

    def inputs(self) -> list[Path]:
        """Return the folders and files that are read."""
        folders = [Path(item.path) for item in self.items if item.kind == EARLIER and item.path]
        return folders + [path for item in self.items for path in item.features.inputs()]

    def describe(self, checksums: Sequence[int]) -> list[dict[str, Any]]:
        """Return what a manifest says of each input; ``checksums`` are of all shards read."""
        found, described = iter(checksums), []
        for item, start in zip(self.items, self.starts, strict=False):
            read = [
                checksum_text(checksum)
                for _, checksum in zip(item.features.shards, found, strict=False)
            ]
            shards = item.features.describe()
            for shard, checksum in zip(shards, item.checksums or read, strict=True):
                shard["checksum"] = checksum
            described.append({
                "name": item.name,
                "kind": item.kind,
                "path": item.path,
                "files": [str(path.absolute()) for path in item.features.paths()],
                "rows": item.features.rows,
                "staying": len(item.live),
                "first": int(start),
                "request": item.request(),
                "shards": shards,
            })  # fmt: skip
        return described


def open_references(
    given: Any, *, array: str | None = None, column: str | None = None
) -> References:
    """Open what ``--reference`` names, and the references of earlier runs among it.

    Parameters
    ----------
    given : str, path, array, or a list of them
        Features, or folders that ``snip dedup`` wrote; in a str several by comma.
    array, column : str, optional
        As `shards.open_features` takes them.

    Raises
    ------
    SnipError
        If features cannot be read, or those of an earlier run are gone or changed.
    """
    items: list[Reference] = []
    for number, source in enumerate(split(given)):
        found = open_one(source, number, {"array": array, "column": column})
        items += [item for item in found if not any(same(item, other) for other in items)]
    return References(items)


def kept_model(references: References, rows: int, options: Dedup) -> Path | None:
    """Return the model of the join that an earlier run kept, where it suits this one.

    It must be of the same settings and libraries, and of a run over no fewer rows than are added:
    its lists and their reach were fitted to those.
    """
    names = ("threshold", "recall", "seed", "encoder")
    for item in references.items:
        if item.kind != EARLIER or item.path is None or item.features.rows < rows:
            continue
        manifest = read_manifest(Path(item.path), KIND)
        settings, path = manifest["settings"], Path(item.path) / locks.WORK / "model.npz"
        same = all(settings[name] == getattr(options, name) for name in names)
        if same and manifest["versions"] == versions() and path.is_file():
            return path
    return None


def split(given: Any) -> list[Any]:
    """Return the inputs that ``--reference`` names."""
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",") if part.strip()]
        return [given] if Path(given).expanduser().exists() else parts
    return list(given) if isinstance(given, list | tuple) else [given]


def same(one: Reference, other: Reference) -> bool:
    """Tell whether two references are one input."""
    if one.path is None or other.path is None or one.kind != other.kind:
        return False
    if is_remote(one.path) or is_remote(other.path):
        return one.path == other.path
    return os.path.realpath(one.path) == os.path.realpath(other.path)


def open_one(source: Any, number: int, how: dict[str, Any]) -> Iterator[Reference]:
    """Yield the references of one input: its own first, where it is an earlier OUT."""
    if not isinstance(source, str | Path):
        features = open_features(source, **how)
        name = f"reference {number}"
        yield Reference(name, FEATURES, None, features, np.arange(features.rows))
        return
    path = absolute_location(source)
    if is_finished(Path(path)):
        yield from open_earlier(Path(path), str(source))
        return
    if (Path(path) / locks.WORK / locks.REQUEST).is_file():
        raise SnipError(f"--reference {source} is of a run that was stopped; finish it first")
    features = open_features(source, **how)
    yield Reference(str(source), FEATURES, path, features, np.arange(features.rows))


def open_earlier(folder: Path, name: str) -> Iterator[Reference]:
    """Yield the references of a finished run, then its rows that stay."""
    import pyarrow.parquet as pq

    manifest = read_manifest(folder, KIND)
    settings = manifest["settings"]
    if settings["features"] is None or not manifest["verified"]:
        raise SnipError(f"{folder} names no features on disk, so it cannot be a --reference")
    how = {key: settings[key] for key in ("parts", "array", "column")}
    for held in manifest.get("references", []):
        yield from open_held(folder, held, how)
    features = open_searched(folder, settings["features"], how)
    check_searched(folder, features, manifest)
    mask = atomic.sha256(folder / "is_dup.npy")
    if mask != manifest["outputs"]["is_dup.npy"]["sha256"]:
        raise SnipError(f"{folder / 'is_dup.npy'} is not what the run wrote; make it anew")
    with as_written(folder):
        live = ~np.load(folder / "is_dup.npy")
        if (folder / "bad_rows.parquet").is_file():
            live[pq.read_table(folder / "bad_rows.parquet")["row"].to_numpy()] = False
    checksums = [shard["checksum"] for shard in manifest["shards"]]
    yield Reference(name, EARLIER, str(folder), features, np.flatnonzero(live), mask, checksums)


def open_held(folder: Path, held: dict[str, Any], how: dict[str, Any]) -> Iterator[Reference]:
    """Yield a reference that a finished run had, which must be what it was then."""
    if held["path"] is None:
        raise SnipError(f"{folder}: its reference was an array, which no later run can read")
    if held["kind"] == EARLIER:
        *_, item = open_earlier(Path(held["path"]), held["path"])
    else:
        how = {**how, "parts": None}
        features = open_searched(folder, held["path"], how)
        check_searched(folder, features, held)
        checksums = [shard["checksum"] for shard in held["shards"]]
        rows = np.arange(features.rows)
        item = Reference(held["path"], FEATURES, held["path"], features, rows, None, checksums)
    if item.mask != held["request"]["mask"]:
        raise SnipError(
            f"{folder}: its reference {held['path']} was made anew since; so must it be"
        )
    yield item


def open_searched(folder: Path, spec: str, how: dict[str, Any]) -> Features:
    """Open the features that a finished run read."""
    try:
        return open_features(spec, **how)
    except SnipError as error:
        raise SnipError(
            f"{folder} was made from features that cannot be read now: {error}"
        ) from error


def check_searched(folder: Path, features: Features, manifest: dict[str, Any]) -> None:
    """Refuse features that are not those a finished run searched.

    Parameters
    ----------
    manifest : dict
        With ``request`` and ``shards``: the run's, or what it says of a reference.

    Raises
    ------
    SnipError
        If shards came, went or changed since.
    """
    now = request_of(features)
    accept_dates(now, features, manifest)
    if len(manifest["shards"]) != len(manifest["request"]["features"]):
        raise SnipError(f"{folder / MANIFEST}: damaged: it names other shards in two places")
    names = [[shard["name"] for shard in found["features"]] for found in (now, manifest["request"])]
    if names[0] != names[1]:
        changed = sorted(set(names[0]) ^ set(names[1])) or ["their order"]
    else:
        known = [(manifest["request"][key], now[key]) for key in now]
        changed = [
            name
            for number, name in enumerate(names[0])
            if any(then[number] != found[number] for then, found in known)
        ]
    if changed:
        raise SnipError(
            f"{folder}: the features are not those that were searched ({changed[0]} differs); "
            "search again"
        )


class Settled(NamedTuple):
    """What a search over reference rows and FEATURES says of FEATURES alone.

    Attributes
    ----------
    forest : Edges
        Maximum spanning forest of the pairs that were found among their distinct rows.
    copies, firsts : (c,) int64
        Exact copies among them.
    nearest : Nearest
        Of each distinct row that matches a reference row; of each row where there are no copies.
    """

    forest: Edges
    copies: np.ndarray
    firsts: np.ndarray
    nearest: Nearest


def settle(
    features: Features,
    frozen: int,
    forest: Edges,
    copies: tuple[np.ndarray, np.ndarray],
    threshold: float,
    threads: int,
    *,
    across: bool = False,
    folder: Path | None = None,
) -> Settled:
    """Cut down what was found over all rows to those after the first ``frozen``.

    Where a group has reference rows, its other rows are compared with all of these: the search
    may have found a pair with another one only.

    Parameters
    ----------
    features : Features
        All rows, reference rows first.
    frozen : int
        How many are reference rows.
    forest : Edges
        Over distinct rows, with a forest of its own for pairs of two that are no reference rows,
        see `forest.spanning_forest`. Pairs of two reference rows may be in it or not.
    copies : two (c,) int64
        Exact copies, and the first row of each.
    threshold, threads
    across : bool
        Leave out what the rows are to one another: no forest, no copies.
    folder : Path, optional
        For what does not fit into memory; None: all is held.
    """
    copy, first, twins = own_copies(*copies, frozen)
    sets, rows = UnionFind(features.rows), features.rows - frozen
    for edges in (forest, twins):
        for start, stop in plan_blocks(len(edges.a), BLOCK_EDGES):
            sets.unite(edges.a[start:stop], edges.b[start:stop])
    nearest = nearest_within(features, sets.labels(), frozen, threshold, threads, folder)
    copy, first = copy - frozen, first - frozen
    if across:
        none = np.empty(0, np.int64)
        every = with_copies(nearest, copy, first, rows, folder and folder / "every")
        return Settled(join_edges([]), none, none, every)
    return Settled(own_forest(forest, frozen, folder), copy, first, nearest)


def own_forest(forest: Edges, frozen: int, folder: Path | None) -> Edges:
    """Return the edges of rows from ``frozen`` on, numbered from there; many are mapped."""
    kinds = {"a": "<i8", "b": "<i8", "similarity": "<f4"}
    columns = Columns(folder and folder / "forest", kinds)
    begin = int(np.searchsorted(forest.a, frozen))  # ascending
    for start, stop in plan_blocks(len(forest.a) - begin, BLOCK_EDGES):
        part = forest.where(slice(begin + start, begin + stop))
        columns.add(part.a - frozen, part.b - frozen, part.similarity)
    return Edges(*columns.arrays())


def own_copies(
    copies: np.ndarray, firsts: np.ndarray, frozen: int
) -> tuple[np.ndarray, np.ndarray, Edges]:
    """Return copies among the rows from ``frozen`` on, their first rows, and twins.

    A twin is the first of these rows that equals a reference row: an edge of cosine 1.
    """
    late = copies >= frozen
    copies, firsts = copies[late], firsts[late]
    outside = firsts < frozen
    reference, place = np.unique(firsts[outside], return_index=True)
    own = copies[outside][place]  # copies are ascending: the first of them is the smallest
    firsts = firsts.copy()
    firsts[outside] = own[np.searchsorted(reference, firsts[outside])]
    rest = copies != firsts
    return copies[rest], firsts[rest], make_edges(reference, own, np.ones(len(own)))
