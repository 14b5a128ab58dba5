"""Hubs: rows with tens of thousands of near copies, which need not all be compared.

"Image not found" pictures come by the hundred thousand. Every two of them are a pair, so they would
visit one another's lists and be compared all with all. Instead one of them, the hub, is found in a
sample. A row within half the largest angle of a pair from the hub is absorbed: an edge to the hub,
verified while its features are at hand, joins it with all the others. It lives in its list, and is
compared there, but visits no other.

A row beside a hub may pair with an absorbed row whose list it must then find alone, so its visit
radius is larger. By the triangle inequality of angles such rows lie within one and a half times the
largest angle of a pair from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.errors import DamagedError
from snipdedup.features.cosine import indexed_cosines, same_bits
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, components, make_edges
from snipdedup.join.projection import Projection
from snipdedup.parallel import ordered_map

HUB_ROWS = 1 << 15  # fewer near copies are compared all with all
SAMPLE_ROWS = 1 << 12, 1 << 16  # the least and the most among which hubs are looked for
SAMPLE_COPIES = 64  # near copies in the sample that show a hub
MOST_HUBS = 64
BLOCK = 256  # rows of the sample compared at a time

ABSORBED, APART, BESIDE = range(3)


class Placed(NamedTuple):
    """Where rows lie to the hubs."""

    zone: np.ndarray  # (n,) int8: `ABSORBED`, `BESIDE` a hub, or `APART` from all
    row: np.ndarray  # (a,) int64: the absorbed rows' places,
    hub: np.ndarray  # (a,) int64: which hub absorbs each,
    similarity: np.ndarray  # (a,) float32: and the cosine of the two


@dataclass(frozen=True)
class Hubs:
    """The hubs of a set; often there are none."""

    row: np.ndarray  # (h,) int64: global rows
    raw: np.ndarray  # (h, d): their features
    codes: np.ndarray  # (h, w) int8
    threshold: float
    projection: Projection

    def check(self, features: Features) -> None:
        """Raise DamagedError unless hubs are, bit for bit, the rows of these features.

        Edges that `place` proves on ``raw`` are then proved for these rows.
        """
        known = (self.row >= 0) & (self.row < features.rows) & (self.raw.dtype == features.dtype)
        known[known] = same_bits(
            features.gather(self.row[known]), self.raw[known].astype(features.dtype)
        )
        if not known.all():
            raise DamagedError(f"hub {self.row[~known][0]:,} is not that row of the features")

    @property
    def half(self) -> float:
        """Cosine of half the largest angle of a pair."""
        return float(np.sqrt((1 + self.threshold) / 2))

    @property
    def border(self) -> float:
        """Cosine of one and a half times that angle."""
        return self.half * (4 * self.half**2 - 3)  # cos 3φ = 4 cos³φ - 3 cos φ

    def pairs(self) -> Edges:
        """Return the pairs among the hubs, as places."""
        i, j = np.triu_indices(len(self.row), 1)
        return make_edges(i, j, indexed_cosines(self.raw, self.raw, i, j)).at(self.threshold)

    @cached_property
    def falls(self) -> np.ndarray:
        """By how much the limit of each hub falls, (h,) int32."""
        return self.projection.encode(self.raw)[1]

    def place(self, codes: np.ndarray, falls: np.ndarray, raw: np.ndarray) -> Placed:
        """Return which rows are absorbed, proved on the features, and which lie beside a hub.

        Of the rows ``codes``, (n, w) int8, with their ``falls``, (n,), and ``raw``, (n, d).
        """
        zone = np.full(len(codes), APART, np.int8)
        none = np.empty(0, np.int64)
        if not len(self.row):
            return Placed(zone, none, none, np.empty(0, np.float32))
        products = hub_products(codes, self.codes)
        i, j = np.nonzero(products >= self.projection.limit(self.half))
        cosine = indexed_cosines(raw, self.raw, i, j)
        inside = cosine >= np.float32(self.half)
        i, j, cosine = i[inside], j[inside], cosine[inside]
        order = np.lexsort((j, -cosine, i))  # the nearest hub; of several the first
        first = order[np.unique(i[order], return_index=True)[1]]
        i, j, cosine = i[first], j[first], cosine[first]
        connected = np.arange(len(self.row))  # for each hub the smallest that pairs connect it with
        nodes, groups = components(self.pairs())
        connected[nodes] = groups
        own = np.full(len(codes), -1)
        own[i] = connected[j]
        beside = products >= self.projection.limit(self.border) - falls[:, None] - self.falls
        beside &= own[:, None] != connected
        zone[i] = ABSORBED
        zone[beside.any(1)] = BESIDE
        return Placed(zone, i, j, cosine)


def hub_products(codes: np.ndarray, hubs: np.ndarray) -> np.ndarray:
    """Return the products of codes, (n, h) int32."""
    return native.products(codes, native.columns(hubs))


def no_hubs(projection: Projection, dim: int, threshold: float) -> Hubs:
    """Return the hubs of a set without any."""
    codes = np.empty((0, projection.width), np.int8)
    return Hubs(np.empty(0, np.int64), np.empty((0, dim)), codes, threshold, projection)


def sample_rows(total: int) -> int:
    """Return among how many rows of a sample the hubs of a set of ``total`` are looked for."""
    return int(np.clip(SAMPLE_COPIES * total / HUB_ROWS, *SAMPLE_ROWS))


def find_hubs(
    rows: np.ndarray,
    sample: np.ndarray,
    codes: np.ndarray,
    projection: Projection,
    *,
    threshold: float,
    total: int,
    threads: int,
) -> Hubs:
    """Find hubs in a sample: greedily the row with the most rows around it.

    ``rows``, (n,) int64, are distinct and in random order; ``sample`` are their features and
    ``codes`` the codes of the first `sample_rows`; ``total`` is how many rows the set has.
    """
    none = no_hubs(projection, sample.shape[1], threshold)
    if total < HUB_ROWS:
        return none
    codes = codes[: sample_rows(total)]
    enough = max(SAMPLE_COPIES, HUB_ROWS / total * len(codes))
    limit = projection.limit(none.half)
    crowd = np.flatnonzero(degrees(codes, limit, threads) >= enough)
    chosen: list[int] = []
    while len(crowd) and len(chosen) < MOST_HUBS:
        around = degrees(codes[crowd], limit, threads)
        best = int(np.argmax(around))
        if around[best] < enough:
            break
        chosen.append(int(crowd[best]))
        crowd = crowd[(hub_products(codes[crowd], codes[chosen[-1:]]) < limit)[:, 0]]
    places = np.array(chosen, np.int64)
    hubs = Hubs(rows[places], sample[places], codes[places], threshold, projection)
    zone = hubs.place(codes, np.zeros(len(codes), np.int32), sample[: len(codes)]).zone
    # where more rows lie beside hubs than are absorbed (a low threshold), hubs would cost more
    return hubs if np.count_nonzero(zone == ABSORBED) > np.count_nonzero(zone == BESIDE) else none


def degrees(codes: np.ndarray, limit: float, threads: int) -> np.ndarray:
    """Return how many products of each code with all codes, itself too, reach a limit, (n,)."""
    columns, most = native.columns(codes), len(codes)

    def count(span: tuple[int, int]) -> np.ndarray:
        part = codes[slice(*span)]
        row, column = native.hits(part, columns, np.full(len(part), limit), first=span[0] + 1)
        row = row + span[0]
        other = column[column != row]
        return np.bincount(row, minlength=most) + np.bincount(other, minlength=most)

    parts = ordered_map(count, plan_blocks(most, BLOCK), threads)
    return sum(parts, np.zeros(most, np.int64))
