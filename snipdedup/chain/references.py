"""Rows that come first: references, which FEATURES are compared with and which never go.

A reference is other features, or an earlier OUT: its rows that stay, and before them its own
references. The search runs over one list of rows, reference rows first; what it found is cut down
to FEATURES, of which each row keeps its nearest reference row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.ground import store
from snipdedup.ground.formats import Shard
from snipdedup.ground.objects import absolute
from snipdedup.ground.shards import Features, accept_dates, open_features, request_of
from snipdedup.grouping.groups import Nearest
from snipdedup.grouping.pairs import pairs_within
from snipdedup.search.forest import Edges, ForestBuilder, components, join_edges, make_edges
from snipdedup.settings import Dedup

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

    def crc_piece(self, start: int, block: np.ndarray) -> tuple[int, int]:
        """See `Shard.crc_piece`; the file's checksum is that of the run that made the choice."""
        del start, block
        return 0, 0


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
    crcs : list of str, optional
        CRC32 of each shard, where an earlier run took them.
    """

    name: str
    kind: str
    path: str | None
    features: Features
    live: np.ndarray
    mask: str | None = None
    crcs: list[str] | None = None

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

    def before(self, features: Features) -> Features:
        """Return the reference rows and then these as one list of rows."""
        shared = set(self.features.paths()) & set(features.paths())
        if shared:
            raise SnipError(
                f"{min(shared)} is of FEATURES and of a --reference too, so all its rows would go; "
                "name as FEATURES what the reference does not hold"
            )
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

    def find(self, names: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of rows by the names of their inputs: what `locate` undoes."""
        numbers = np.empty(len(rows), np.int64)
        for which, item in enumerate(self.items):
            at = names == item.name
            numbers[at] = np.searchsorted(item.live, rows[at]) + self.starts[which]
        return numbers

    def inputs(self) -> list[Path]:
        """Return the folders and files that are read."""
        folders = [Path(item.path) for item in self.items if item.kind == EARLIER and item.path]
        return folders + [path for item in self.items for path in item.features.inputs()]

    def describe(self, crcs: Sequence[int]) -> list[dict[str, Any]]:
        """Return what a manifest says of each input; ``crcs`` of all shards, as they were read."""
        found, described = iter(crcs), []
        for item, start in zip(self.items, self.starts, strict=False):
            read = [f"{crc:08x}" for _, crc in zip(item.features.shards, found, strict=False)]
            shards = item.features.describe()
            for shard, crc in zip(shards, item.crcs or read, strict=True):
                shard["crc32"] = crc
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
        manifest = store.read_manifest(Path(item.path), KIND)
        settings, path = manifest["settings"], Path(item.path) / store.WORK / "model.npz"
        same = all(settings[name] == getattr(options, name) for name in names)
        if same and manifest["versions"] == store.versions() and path.is_file():
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
    return one.path is not None and (one.path, one.kind) == (other.path, other.kind)


def open_one(source: Any, number: int, how: dict[str, Any]) -> Iterator[Reference]:
    """Yield the references of one input: its own first, where it is an earlier OUT."""
    if not isinstance(source, str | Path):
        features = open_features(source, **how)
        name = f"reference {number}"
        yield Reference(name, FEATURES, None, features, np.arange(features.rows))
        return
    path = absolute(source)
    if store.is_finished(Path(path)):
        yield from open_earlier(Path(path), str(source))
        return
    if (Path(path) / store.WORK / store.REQUEST).is_file():
        raise SnipError(f"--reference {source} is of a run that was stopped; finish it first")
    features = open_features(source, **how)
    yield Reference(str(source), FEATURES, path, features, np.arange(features.rows))


def open_earlier(folder: Path, name: str) -> Iterator[Reference]:
    """Yield the references of a finished run, then its rows that stay."""
    import pyarrow.parquet as pq

    manifest = store.read_manifest(folder, KIND)
    settings = manifest["settings"]
    if settings["features"] is None or not manifest["verified"]:
        raise SnipError(f"{folder} names no features on disk, so it cannot be a --reference")
    how = {key: settings[key] for key in ("parts", "array", "column")}
    for held in manifest.get("references", []):
        yield from open_held(folder, held, how)
    features = open_searched(folder, settings["features"], how)
    check_searched(folder, features, manifest)
    mask = store.sha256(folder / "is_dup.npy")
    if mask != manifest["outputs"]["is_dup.npy"]["sha256"]:
        raise SnipError(f"{folder / 'is_dup.npy'} is not what the run wrote; make it anew")
    with store.as_written(folder):
        live = ~np.load(folder / "is_dup.npy")
        if (folder / "bad_rows.parquet").is_file():
            live[pq.read_table(folder / "bad_rows.parquet")["row"].to_numpy()] = False
    crcs = [shard["crc32"] for shard in manifest["shards"]]
    yield Reference(name, EARLIER, str(folder), features, np.flatnonzero(live), mask, crcs)


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
        crcs = [shard["crc32"] for shard in held["shards"]]
        rows = np.arange(features.rows)
        item = Reference(held["path"], FEATURES, held["path"], features, rows, None, crcs)
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
        raise SnipError(f"{folder / store.MANIFEST}: damaged: it names other shards in two places")
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
        Maximum spanning forest of the pairs among their distinct rows.
    copies, firsts : (c,) int64
        Exact copies among them.
    nearest : Nearest
        Of each distinct row that matches a reference row.
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
) -> Settled:
    """Cut down what was found over all rows to those after the first ``frozen``.

    A forest over all rows does not hold the forest of some: where a group has reference rows, its
    other rows are compared again, with one another and with these.

    Parameters
    ----------
    features : Features
        All rows, reference rows first.
    frozen : int
        How many are reference rows.
    forest : Edges
        Over distinct rows. Pairs of two reference rows may be in it or not.
    copies : two (c,) int64
        Exact copies, and the first row of each.
    threshold, threads
    """
    copy, first, twins = own_copies(*copies, frozen)
    row, group = components(join_edges([forest, twins]))
    order = np.lexsort((row, group))
    row, group = row[order], group[order]
    mixed = np.isin(group, group[row < frozen])
    alone = ~np.isin(forest.a, row[mixed])
    builder, nearest = ForestBuilder(), NearestBuilder()
    builder.add(forest.where(alone))
    nearest.add(twins)
    some = pairs_within(features, row[mixed], group[mixed], threshold, threads, frozen=frozen)
    for edges in some:
        across = edges.a < frozen
        builder.add(edges.where(~across))
        nearest.add(edges.where(across))
    found = builder.forest()
    return Settled(
        Edges(found.a - frozen, found.b - frozen, found.similarity),
        copy - frozen,
        first - frozen,
        nearest.result(frozen),
    )


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


class NearestBuilder:
    """Takes edges from reference rows (a) to others (b); keeps the best of each b."""

    def __init__(self) -> None:
        self.best = join_edges([])

    def add(self, edges: Edges) -> None:
        """Take more edges; of equally near reference rows the first is kept."""
        if len(edges.a):
            edges = join_edges([self.best, edges])
            order = np.lexsort((edges.a, -edges.similarity, edges.b))
            self.best = edges.where(order[np.unique(edges.b[order], return_index=True)[1]])

    def result(self, frozen: int) -> Nearest:
        """Return the nearest reference row of each row, numbered from ``frozen``."""
        return Nearest(self.best.b - frozen, self.best.a, self.best.similarity)
