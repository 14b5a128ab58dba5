"""What there is to see in OUT: curves, histograms, and samples that a seed draws.

Tables are streamed, whole groups at a time, and what is held is what will be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.groups.members import Members, group_starts, keep_rank
from snipdedup.metadata.files import open_parquet

BATCH_ROWS = 1 << 19
STOPS = 128  # of the slider, at the most: a stop's number fits a byte with room to spare
GROUPS, MEMBERS = 12, 12  # largest groups shown, and rows of each
NARROWEST = 1e-5  # bin of cosines: they may lie anywhere from -1 to 1
COPIED = 12  # rows that stand for most others
CHAINED = 12
# Removed pairs shown, by where their cosine lies between the threshold (0) and 1.
BANDS = ((0.0, 0.02, 24), (0.02, 0.1, 12), (0.1, 0.3, 8), (0.3, 0.6, 8), (0.6, 1.0, 8))
EXACT = 4  # pairs shown with a cosine of exactly 1
KEEPS = ("first", "last", "random")


@dataclass(frozen=True)
class Run:
    """What a survey has to know of the run.

    Attributes
    ----------
    threshold : float
    keep, seed
        What decided which row stays.
    offsets : (shards + 1,) int64
        First row of each shard, then the number of rows.
    """

    threshold: float
    keep: str
    seed: int
    offsets: np.ndarray


@dataclass(frozen=True)
class Curve:
    """What ``--grouping components`` would do at each stop, (s,) each.

    Attributes
    ----------
    thresholds : list of str
        As typed after ``--threshold``; ascending, the searched one first.
    removed, groups : (s,) int64
    """

    thresholds: list[str]
    removed: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Group:
    """One group, and some of its members.

    Attributes
    ----------
    size, removed : int
    lowest : float
        The smallest cosine of a removed row with its representative.
    shown : Members
    """

    size: int
    removed: int
    lowest: float
    shown: Members


@dataclass(frozen=True)
class Band:
    """Removed rows whose cosine with their representative lies in a range; some of them.

    Attributes
    ----------
    low, high : float
        The range, ``high`` exclusive; both 1 for rows with a cosine of exactly 1.
    rows : int
        Removed rows in it.
    shown : Members
        A representative below 0 is the complement of a reference's row.
    """

    low: float
    high: float
    rows: int
    shown: Members


@dataclass(frozen=True)
class Survey:
    """What one pass over ``groups.parquet`` found.

    Attributes
    ----------
    edges, similarities : (n,) float64, (n,) int64
        Lower ends of bins, and removed rows by cosine with their representative; the last bin
        holds those of exactly 1.
    bands : list of Band
    largest : list of Group
    copied, copies : (k,) int64
        The rows that represent most others, and how many.
    spared, spared_by, spared_rows : Members, (m,) int64, int
        Rows that stay although one row of their group would do for components, that row, and how
        many there are.
    below : Band
        Removed rows below the threshold to their representative.
    foreign : (shards,) int64
        Removed rows whose representative lies in another shard, by their own shard.
    """

    edges: np.ndarray
    similarities: np.ndarray
    bands: list[Band]
    largest: list[Group]
    copied: np.ndarray
    copies: np.ndarray
    spared: Members
    spared_by: np.ndarray
    spared_rows: int
    below: Band
    foreign: np.ndarray


def threshold_stops(start: float) -> list[str]:
    """Return the slider's thresholds: ``start``, then round ones up to 1."""
    first, step = Decimal(repr(round(start, 9))), bin_width(start)
    inner = math.floor(first / step) + 1
    stops = {first, Decimal(1), *(step * k for k in range(inner, math.floor(1 / step) + 1))}
    return [format(stop.normalize(), "f") for stop in sorted(stops)]


def bin_width(start: float) -> Decimal:
    """Return 1, 2 or 5 times a power of ten, the smallest with at most `STOPS` steps up to 1."""
    least = max(Decimal(1) - Decimal(repr(round(start, 9))), Decimal("1e-6")) / (STOPS - 2)
    power = Decimal(10) ** math.floor(least.log10())
    return next(power * k for k in (1, 2, 5, 10) if power * k >= least)


def read_curve(path: Path, rows: int, start: float) -> Curve:
    """Read the forest into what components would do at each stop.

    At any threshold the forest's edges span the components: each edge is a row that goes, and the
    rows that edges touch, less the edges, are the groups.

    Parameters
    ----------
    path : Path
        ``forest.parquet``.
    rows : int
        Of the whole set; a byte of memory for each.
    start : float
        The threshold of the run.
    """
    thresholds = threshold_stops(start)
    stops = np.array([float(text) for text in thresholds]).astype(np.float32)
    stops[0] = np.float32(start)
    edges, touched = np.zeros(len(stops) + 1, np.int64), np.zeros(rows, np.uint8)
    for batch in open_parquet(path).iter_batches(BATCH_ROWS):
        a, b, similarity = (batch.column(name) for name in ("a", "b", "similarity"))
        passes = np.searchsorted(stops, similarity.to_numpy(zero_copy_only=False), "right")
        edges += np.bincount(passes, minlength=len(edges))
        for end in (a.to_numpy(), b.to_numpy()):
            np.maximum.at(touched, end, passes.astype(np.uint8))
    nodes = np.zeros(len(edges), np.int64)
    for low, high in plan_blocks(rows, BATCH_ROWS):  # it makes eight bytes of each
        nodes += np.bincount(touched[low:high], minlength=len(edges))
    removed, members = (np.cumsum(count[::-1])[::-1][1:] for count in (edges, nodes))
    return Curve(thresholds, removed, members - removed)


class Reservoir:
    """Keeps a random sample: of all members offered, those with the smallest hash.

    So the sample depends on seed and rows, not on the order or on batches.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.offered = size, seed, 0
        self.held: list[np.ndarray] = []

    def offer(self, *columns: np.ndarray) -> None:
        """Take columns of equal length; the first holds rows."""
        self.offered += len(columns[0])
        if self.held:
            columns = tuple(map(np.concatenate, zip(self.held, columns, strict=True)))
        rank = keep_rank(columns[0], "random", self.seed)
        best = np.arange(len(rank))
        if len(rank) > self.size:
            best = np.argpartition(rank, self.size)[: self.size]
        best = best[np.argsort(rank[best])]
        self.held = [column[best] for column in columns]

    def members(self) -> Members:
        """Return the sample, for what was offered as the columns of `Members`."""
        empty = [np.empty(0, kind) for kind in (np.int64, np.int64, np.int64, np.float32, bool)]
        return Members(*(self.held or empty)[:5])


class Surveyor:
    """Takes whole groups, a few at a time, and holds what a `Survey` needs."""

    def __init__(self, run: Run, seed: int) -> None:
        threshold = run.threshold
        self.run, self.seed, self.threshold = run, seed, np.float32(threshold)
        width = max(float(bin_width(threshold)), NARROWEST)
        steps = math.ceil(2 / width)
        self.bins = (1 - width * np.arange(steps, -1, -1)).astype(np.float32)  # from about -1 to 1
        self.similarities = np.zeros(steps + 1, np.int64)
        cuts = [round(threshold + (1 - threshold) * low, 4) for low, _, _ in BANDS]
        self.cuts = np.array([threshold, *cuts[1:], 1], np.float64)
        sizes = [*(size for _, _, size in BANDS), EXACT]
        self.bands = [Reservoir(size, seed) for size in sizes]
        self.spared, self.below = Reservoir(CHAINED, seed), Reservoir(CHAINED, seed)
        self.largest: list[Group] = []
        self.copied = self.copies = np.empty(0, np.int64)
        self.foreign = np.zeros(len(run.offsets) - 1, np.int64)

    def add(self, members: Members) -> None:
        """Take the members of whole groups, ordered by group."""
        gone = pick(members, members.is_dup)
        self._similarities(gone)
        gone = pick(gone, gone.representative >= 0)  # others go because of a reference
        self._copied(gone)
        self._shards(gone)
        starts = group_starts(members.group)
        self._spared(members)
        self._largest(members, starts)

    def _similarities(self, gone: Members) -> None:
        known = gone.similarity[~np.isnan(gone.similarity)]
        bins = np.clip(np.searchsorted(self.bins, known, "right") - 1, 0, None)
        self.similarities += np.bincount(bins, minlength=len(self.similarities))
        band = np.searchsorted(self.cuts.astype(np.float32), gone.similarity, "right") - 1
        band[np.isnan(gone.similarity)] = 0
        for number, reservoir in enumerate(self.bands):
            reservoir.offer(*pick(gone, band == number))
        self.below.offer(*pick(gone, gone.similarity < self.threshold))

    def _copied(self, gone: Members) -> None:
        """A representative lies in its group, so its count is whole."""
        rows, counts = np.unique(gone.representative, return_counts=True)
        rows, counts = np.append(self.copied, rows), np.append(self.copies, counts)
        best = np.lexsort((rows, -counts))[:COPIED]
        self.copied, self.copies = rows[best], counts[best]

    def _shards(self, gone: Members) -> None:
        own, other = (
            np.searchsorted(self.run.offsets, rows, "right") - 1
            for rows in (gone.row, gone.representative)
        )
        self.foreign += np.bincount(own[own != other], minlength=len(self.foreign))

    def _spared(self, members: Members) -> None:
        stays = pick(members, ~members.is_dup)
        keep = self.run.keep if self.run.keep in KEEPS else "first"  # others need the metadata
        rank = keep_rank(stays.row, keep, self.run.seed)
        order = np.lexsort((rank, stays.group))
        stays = pick(stays, order)
        starts = group_starts(stays.group)
        keeper = np.repeat(stays.row[starts[:-1]], np.diff(starts))
        spared = stays.row != keeper
        self.spared.offer(*pick(stays, spared), keeper[spared])

    def _largest(self, members: Members, starts: np.ndarray) -> None:
        sizes = np.diff(starts)
        for number in np.argsort(-sizes, kind="stable")[:GROUPS]:
            group = pick(members, slice(starts[number], starts[number + 1]))
            removed = int(group.is_dup.sum())
            lowest = float(group.similarity.min())
            self.largest.append(Group(len(group.row), removed, lowest, self._shown(group)))
        self.largest.sort(key=lambda group: (-group.size, int(group.shown.group[0])))
        del self.largest[GROUPS:]

    def _shown(self, group: Members) -> Members:
        """Return the row that stands for most others, and some of the rest."""
        named = group.representative[group.is_dup & (group.representative >= 0)]
        rows, counts = np.unique(named, return_counts=True)
        first = group.row == (rows[counts.argmax()] if len(rows) else group.row[0])
        rank = keep_rank(group.row, "random", self.seed)
        return pick(group, np.lexsort((rank, ~first))[:MEMBERS])

    def survey(self) -> Survey:
        """Return what was found."""
        filled = np.flatnonzero(self.similarities)
        lowest = int(np.searchsorted(self.bins, self.threshold, "right")) - 1
        begin = min(lowest, *filled[:1].tolist(), len(self.similarities) - 2)
        cuts = self.cuts.tolist()
        return Survey(
            edges=self.bins[begin:].astype(np.float64),
            similarities=self.similarities[begin:],
            bands=[
                Band(low, high, sample.offered, ordered(sample.members()))
                for low, high, sample in zip(cuts, [*cuts[1:], 1.0], self.bands, strict=True)
            ],
            largest=self.largest,
            copied=self.copied,
            copies=self.copies,
            spared=self.spared.members(),
            spared_by=self.spared.held[5] if self.spared.held else np.empty(0, np.int64),
            spared_rows=self.spared.offered,
            below=Band(-1, float(self.threshold), self.below.offered, self.below.members()),
            foreign=self.foreign,
        )


def pick(members: Members, which: Any) -> Members:
    """Return the members that a mask, places or a slice select."""
    return Members(*(column[which] for column in members))


def ordered(members: Members) -> Members:
    """Return members by similarity, then row."""
    return pick(members, np.lexsort((members.row, members.similarity)))


def whole_groups(path: Path, *, marked: bool = False) -> Iterator[Members]:
    """Yield the members of ``groups.parquet`` in batches that cut no group.

    With ``marked``, a representative that is a row of a reference comes as its complement, < 0.
    """
    waiting: list[Members] = []
    file, columns = open_parquet(path), list(Members._fields)
    if marked and "reference" in file.schema_arrow.names:
        columns.append("reference")
    check_columns(path, file.schema_arrow)
    for batch in file.iter_batches(BATCH_ROWS, columns=columns):
        members = Members(
            *(batch.column(name).to_numpy(zero_copy_only=False) for name in Members._fields)
        )
        if "reference" in columns:
            outside = batch.column("reference").is_valid().to_numpy(zero_copy_only=False)
            named = np.where(outside, ~members.representative, members.representative)
            members = members._replace(representative=named)
        if not len(members.row):
            continue
        cut = int(np.searchsorted(members.group, members.group[-1]))
        if waiting and (cut or waiting[0].group[0] != members.group[0]):
            yield joined([*waiting, pick(members, slice(cut))])
            waiting = []
        elif cut:
            yield pick(members, slice(cut))
        waiting.append(pick(members, slice(cut, None)))
    if waiting:
        yield joined(waiting)


def check_columns(path: Path, schema: Any) -> None:
    """Refuse a table of groups whose columns are not those that snip writes."""
    import pyarrow as pa

    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)
    wanted = {"similarity": kinds[2], "is_dup": kinds[1]}
    for name in Members._fields:
        held = [field.type for field in schema if field.name == name]
        if len(held) != 1 or not wanted.get(name, kinds[0])(held[0]):
            found = ", ".join(map(str, held)) or "none"
            raise SnipError(f"{path}: damaged: found {found} as column {name!r}; make it anew")


def joined(parts: list[Members]) -> Members:
    """Return several lists of members as one."""
    return Members(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def read_keys(path: Path, rows: np.ndarray) -> dict[int, str]:
    """Return the keys of some rows of ``groups.parquet``; rows without one are left out."""
    wanted = np.sort(rows)
    keys: dict[int, str] = {}
    for batch in open_parquet(path).iter_batches(BATCH_ROWS, columns=["row", "key"]):
        if not len(wanted) or batch.column("key").null_count == batch.num_rows:
            continue
        row = batch.column("row").to_numpy()
        place = np.minimum(np.searchsorted(wanted, row), len(wanted) - 1)
        at = np.flatnonzero(wanted[place] == row)
        found = batch.column("key").take(at).to_pylist()
        keys |= {int(r): key for r, key in zip(row[at], found, strict=True) if key is not None}
    return keys


def read_partners(path: Path, rows: np.ndarray) -> dict[int, tuple[int, float]]:
    """Return (representative, cosine) of rows in ``groups.parquet``; of a reference: ~row."""
    table, partners = open_parquet(path), {}
    columns = ["row", "representative", "similarity"]
    columns += ["reference"] * ("reference" in table.schema_arrow.names)
    for batch in table.iter_batches(BATCH_ROWS, columns=columns):
        at = np.flatnonzero(np.isin(batch.column("row").to_numpy(), rows))
        for line in batch.take(at).to_pylist():
            other, similarity = line["representative"], line["similarity"]
            other = other if line.get("reference") is None else ~other
            partners[line["row"]] = (other, np.nan if similarity is None else similarity)
    return partners


def survey_groups(path: Path, run: Run, seed: int) -> Survey:
    """Read ``groups.parquet`` once; ``seed`` draws the samples."""
    surveyor = Surveyor(run, seed)
    for members in whole_groups(path, marked=True):
        surveyor.add(members)
    return surveyor.survey()
