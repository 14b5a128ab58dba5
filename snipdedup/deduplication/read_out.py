"""Read the tables of a finished OUT in a stream: whole groups, keys, and figures for a report.

Memory holds one batch, and what will be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.deduplication.second_features import ALSO
from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.groups.keep import keep_rank
from snipdedup.groups.members import Members, concatenate, group_starts, no_members
from snipdedup.metadata.tables import stream_parquet

BATCH_ROWS = 1 << 19
STOPS = 128  # of the slider, at the most: a stop's number fits a byte with room to spare
SHOWN_MEMBERS = 12  # of a group
NARROWEST = 1e-5  # bin of cosines: they may lie anywhere from -1 to 1
COPIED = 12  # rows that represent most others
CHAINED = 12
# Removed pairs shown, by where their cosine lies between the threshold (0) and 1.
BANDS = ((0.0, 0.02, 24), (0.02, 0.1, 12), (0.1, 0.3, 8), (0.3, 0.6, 8), (0.6, 1.0, 8))
EXACT = 4  # pairs shown with a cosine of exactly 1
KEEPS = ("first", "last", "random")


@dataclass(frozen=True)
class Curve:
    """What components would remove at each threshold, and how many groups, (s,) int64 each."""

    thresholds: list[str]  # as typed after ``--threshold``, ascending, the searched one first
    removed: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Group:
    """One group and some of its members; ``lowest`` is the smallest similarity in it."""

    size: int
    removed: int
    lowest: float
    shown: Members


class Sample:
    """How many members were offered, ``rows``, and some of them, ``shown``.

    Shown are those with the smallest hash of seed and row, whatever their order and the batches.
    Their similarity lies in [low, high), both 1 for exactly 1; a representative below 0 is the
    complement of a reference row.
    """

    def __init__(self, size: int, seed: int, low: float = -1.0, high: float = 1.0) -> None:
        self.size, self.seed, self.low, self.high = size, seed, low, high
        self.rows, self.shown = 0, no_members()

    def offer(self, members: Members) -> None:
        """Take members."""
        self.rows += len(members.row)
        both = concatenate(self.shown, members)
        rank = keep_rank(both.row, "random", self.seed)
        self.shown = pick(both, np.argsort(rank, kind="stable")[: self.size])


@dataclass(frozen=True)
class Survey:
    """Figures and samples of ``groups.parquet``."""

    edges: np.ndarray  # (n,) float64: lower ends of bins; the last bin holds exactly 1
    similarities: np.ndarray  # (n,) int64: removed rows by similarity
    bands: list[Sample]  # removed rows by similarity, ordered by it
    largest: list[Group]
    copied: np.ndarray  # (k,) int64: the rows that represent most others
    copies: np.ndarray  # (k,) int64: and how many
    spared: Sample  # kept rows that components would remove, for their ``representative``
    below: Sample  # removed rows below the threshold to their representative
    foreign: np.ndarray  # (shards,) int64: removed for a row of another shard, by their own shard


def threshold_stops(start: float, known: Sequence[float] = ()) -> list[str]:
    """Return the slider's thresholds: ``start``, then round and ``known`` ones up to 1."""
    first, step = Decimal(repr(round(start, 9))), bin_width(start)
    inner = math.floor(first / step) + 1
    more = (Decimal(repr(round(threshold, 9))) for threshold in known)
    stops = {first, Decimal(1), *more, *(step * k for k in range(inner, math.floor(1 / step) + 1))}
    return [format(stop.normalize(), "f") for stop in sorted(stops)]


def bin_width(start: float) -> Decimal:
    """Return 1, 2 or 5 times a power of ten, the smallest with at most `STOPS` steps up to 1."""
    least = max(Decimal(1) - Decimal(repr(round(start, 9))), Decimal("1e-6")) / (STOPS - 2)
    power = Decimal(10) ** math.floor(least.log10())
    return next(power * k for k in (1, 2, 5, 10) if power * k >= least)


def read_curve(path: Path, rows: int, start: float, known: Sequence[float] = ()) -> Curve:
    """Read ``forest.parquet`` into what components would do at each stop from ``start`` on.

    ``known`` thresholds are stops, too.

    At any threshold the forest's edges span the components: each edge is a removed row, and the
    rows that edges touch, less the edges, are the groups. Memory is a byte for each of all rows.
    """
    thresholds = threshold_stops(start, known)
    stops = np.array([float(text) for text in thresholds]).astype(np.float32)
    stops[0] = np.float32(start)
    edges, touched = np.zeros(len(stops) + 1, np.int64), np.zeros(rows, np.uint8)
    for batch in stream_parquet(path).iter_batches(BATCH_ROWS):
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


def survey_groups(
    path: Path, settings: dict[str, Any], offsets: np.ndarray, seed: int, most: int
) -> Survey:
    """Read ``groups.parquet`` once; ``seed`` draws the samples.

    ``settings`` are those of the run, ``offsets`` the first row of each shard, and the end.
    At ``most`` so many of the largest groups are returned.
    """
    start, threshold = settings["threshold"], np.float32(settings["threshold"])
    width = max(float(bin_width(start)), NARROWEST)
    steps = math.ceil(2 / width)
    bins = (1 - width * np.arange(steps, -1, -1)).astype(np.float32)  # from about -1 to 1
    similarities = np.zeros(steps + 1, np.int64)
    low = [start, *(round(start + (1 - start) * share, 4) for share, _, _ in BANDS[1:]), 1.0]
    sizes = [*(size for _, _, size in BANDS), EXACT]
    bands = [Sample(*band) for band in zip(sizes, repeat(seed), low, [*low[1:], 1.0], strict=False)]
    spared, below = Sample(CHAINED, seed), Sample(CHAINED, seed, -1, float(threshold))
    foreign = np.zeros(len(offsets) - 1, np.int64)
    largest: list[Group] = []
    copied = copies = np.empty(0, np.int64)
    for members in whole_groups(path):
        removed = pick(members, members.is_dup & (members.representative != members.row))
        known = removed.similarity[~np.isnan(removed.similarity)]
        place = np.clip(np.searchsorted(bins, known, "right") - 1, 0, None)
        similarities += np.bincount(place, minlength=len(similarities))
        band = np.searchsorted(np.array(low, np.float32), removed.similarity, "right") - 1
        band[np.isnan(removed.similarity)] = 0
        for number, sample in enumerate(bands):
            sample.offer(pick(removed, band == number))
        below.offer(pick(removed, removed.similarity < threshold))
        removed = pick(removed, removed.representative >= 0)  # not those of a reference row
        more, times = np.unique(removed.representative, return_counts=True)
        copied, copies = np.append(copied, more), np.append(copies, times)
        best = np.lexsort((copied, -copies))[:COPIED]
        copied, copies = copied[best], copies[best]
        sides = removed.row, removed.representative
        own, other = (np.searchsorted(offsets, side, "right") - 1 for side in sides)
        foreign += np.bincount(own[own != other], minlength=len(foreign))
        spared.offer(spared_members(members, settings["keep"], settings["seed"] or 0))
        largest = largest_groups(largest, members, seed, most)
    filled = np.flatnonzero(similarities)
    lowest = int(np.searchsorted(bins, threshold, "right")) - 1
    begin = min(lowest, *filled[:1].tolist(), len(similarities) - 2)
    for sample in bands:
        order = np.lexsort((sample.shown.row, sample.shown.similarity))
        sample.shown = pick(sample.shown, order)
    return Survey(
        bins[begin:].astype(np.float64), similarities[begin:], bands, largest, copied, copies,
        spared, below, foreign,
    )  # fmt: skip


def spared_members(members: Members, keep: str, seed: int) -> Members:
    """Return kept rows that components would remove, each with the row it would be removed for."""
    kept = pick(members, ~members.is_dup)
    keep = keep if keep in KEEPS else "first"  # others need the metadata
    kept = pick(kept, np.lexsort((keep_rank(kept.row, keep, seed), kept.group)))
    starts = group_starts(kept.group)
    kept = kept._replace(representative=np.repeat(kept.row[starts[:-1]], np.diff(starts)))
    return pick(kept, kept.row != kept.representative)


def largest_groups(known: list[Group], members: Members, seed: int, most: int) -> list[Group]:
    """Return the ``most`` largest of some groups and of these members', with some rows of each."""
    starts = group_starts(members.group)
    sizes, groups = np.diff(starts), list(known)
    least = known[-1].size if len(known) == most else 0  # of a group that goes before the last
    order = np.argsort(-sizes, kind="stable")[:most]
    for number in order[sizes[order] > least]:
        group = pick(members, slice(starts[number], starts[number + 1]))
        for_other = group.is_dup & (group.representative >= 0) & (group.representative != group.row)
        named = group.representative[for_other]
        rows, counts = np.unique(named, return_counts=True)
        first = group.row == (rows[counts.argmax()] if len(rows) else group.row[0])
        shown = np.lexsort((keep_rank(group.row, "random", seed), ~first))[:SHOWN_MEMBERS]
        lowest = float(group.similarity.min())
        groups.append(Group(len(group.row), int(group.is_dup.sum()), lowest, pick(group, shown)))
    return sorted(groups, key=lambda group: (-group.size, int(group.shown.group[0])))[:most]


def pick(members: Members, which: Any) -> Members:
    """Return the members that a mask, places or a slice select."""
    return Members(*(column[which] for column in members))


def whole_groups(path: Path) -> Iterator[Members]:
    """Yield the members of ``groups.parquet`` in batches that cut no group.

    A representative that is a row of a reference comes as its complement, < 0.
    """
    file, columns = stream_parquet(path), list(Members._fields)
    kinds = {"similarity": pa.types.is_floating, "is_dup": pa.types.is_boolean}
    for name in Members._fields:
        types = [field.type for field in file.schema_arrow if field.name == name]
        if len(types) != 1 or not kinds.get(name, pa.types.is_integer)(types[0]):
            found = ", ".join(map(str, types)) or "none"
            raise SnipError(f"{path}: damaged: found {found} as column {name!r}; make it anew")
    if "reference" in file.schema_arrow.names:
        columns.append("reference")
    waiting: list[Members] = []  # parts of one group
    for batch in file.iter_batches(BATCH_ROWS, columns=columns):
        values = [batch.column(name).to_numpy(zero_copy_only=False) for name in Members._fields]
        members = Members(*values)
        if "reference" in columns:
            outside = batch.column("reference").is_valid().to_numpy(zero_copy_only=False)
            named = np.where(outside, ~members.representative, members.representative)
            members = members._replace(representative=named)
        if not len(members.row):
            continue
        cut = int(np.searchsorted(members.group, members.group[-1]))
        if waiting and (cut or waiting[0].group[0] != members.group[0]):
            yield concatenate(*waiting, pick(members, slice(cut)))
            waiting = []
        elif cut:
            yield pick(members, slice(cut))
        waiting.append(pick(members, slice(cut, None)))
    if waiting:
        yield concatenate(*waiting)


def read_keys(path: Path, rows: np.ndarray) -> dict[int, str]:
    """Return the keys of some rows of ``groups.parquet``; rows without one are left out."""
    keys: dict[int, str | None] = {}
    for batch in stream_parquet(path).iter_batches(BATCH_ROWS, columns=["row", "key"]):
        some = batch.take(np.flatnonzero(np.isin(batch.column("row"), rows)))
        keys |= dict(zip(some["row"].to_pylist(), some["key"].to_pylist(), strict=True))
    return {row: key for row, key in keys.items() if key is not None}


def read_also(path: Path, rows: np.ndarray) -> dict[int, list[float]]:
    """Return the cosines of rows with their representatives in second features, of removed rows."""
    file = stream_parquet(path)
    columns = [name for name in file.schema_arrow.names if name.startswith(ALSO)]
    found: dict[int, list[float]] = {}
    for batch in file.iter_batches(BATCH_ROWS, columns=["row", *columns]) if columns else ():
        some = batch.take(np.flatnonzero(np.isin(batch.column("row"), rows)))
        values = zip(*(some[name].to_pylist() for name in columns), strict=True)
        pairs = zip(some["row"].to_pylist(), values, strict=True)
        found |= {row: list(cosines) for row, cosines in pairs if None not in cosines}
    return found


def read_partners(path: Path, rows: np.ndarray) -> dict[int, tuple[int, float]]:
    """Return (representative, cosine) of rows in ``groups.parquet``; of a reference: ~row."""
    partners: dict[int, tuple[int, float]] = {}
    for members in whole_groups(path):
        some = pick(members, np.isin(members.row, rows))
        named = zip(some.representative.tolist(), some.similarity.tolist(), strict=True)
        partners |= dict(zip(some.row.tolist(), named, strict=True))
    return partners
