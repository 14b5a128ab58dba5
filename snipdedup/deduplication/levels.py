"""What other thresholds would remove: the table of a run, by both groupings.

Components are read from the forest. Star decides the groups again at each threshold, as a run there
would. Where groups have very many rows, that would take as long as a run: then some groups stand
for all, drawn by a hash of their first row; and of a huge group the rows that come first in keep
order, on which later ones have no influence. What these lose, over what they lose in this run, is
applied to what all lose in this run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import native
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.groups.keep import keep_rank
from snipdedup.groups.members import Block, Members, Rank, group_starts
from snipdedup.join.forest import components, make_edges, number_ends
from snipdedup.native.fallback import find_roots

DECIDED_ROWS = 1 << 16  # rows of groups decided again at a threshold, about
HUGE = 2048  # rows of a group that is decided whole; of a larger one so many are
Decide = Callable[[Block, float], Members]  # whole groups at a threshold: what star does


def tabulate(
    search: PairSearch, thresholds: list[float], folder: Path | None, star: StarCount | None
) -> list[dict[str, Any]]:
    """Return the lines of the threshold table.

    ``removed``, ``groups`` and ``largest`` are of components; with ``star``, ``removed`` is of
    star, ``components`` of components, and ``estimated`` says whether all groups were decided.
    """
    lines: list[dict[str, Any]] = [
        {"threshold": t, "removed": 0, "groups": 0, "largest": 1} for t in thresholds
    ]
    for block in search.blocks(search.threshold, folder) if lines else ():
        for line, sizes in zip(lines, component_sizes(block, thresholds), strict=True):
            largest = int(sizes.max(initial=1))
            line["removed"] += int(sizes.sum()) - len(sizes)
            line["groups"] += len(sizes)
            line["largest"] = max(line["largest"], largest)
            if star is not None:
                star.add(block, line["threshold"], largest)
    return lines if star is None else [star.line(line, search.nearest is None) for line in lines]


def component_sizes(block: Block, thresholds: list[float]) -> list[np.ndarray]:
    """Return the sizes of components of two rows and more at each threshold, (n,) int64 each."""
    forest = block.whole_forest()
    count, a, b = number_ends(forest)
    nodes, parent, above = np.arange(count), np.arange(count), np.float32(np.inf)
    found = [np.empty(0, np.int64)] * len(thresholds)
    for number in np.argsort(thresholds)[::-1].tolist():  # so each edge is looked at once
        least = np.float32(thresholds[number])
        new = np.flatnonzero((forest.similarity >= least) & (forest.similarity < above))
        native.join_best(a[new], b[new], parent)
        sizes, above = np.bincount(find_roots(parent, nodes), minlength=1), least
        found[number] = sizes[sizes > 1]
    return found


class StarCount:
    """How many rows star removes at each threshold; groups are added a block at a time.

    ``is_dup``, (rows,) bool, is this run's decision, at ``known``; ``rows`` is how many are in
    groups, about; ``dropped``, (n,) int64, are removed by a person, in a group or not.
    """

    def __init__(
        self,
        decide: Decide,
        rank: Rank,
        known: float,
        is_dup: np.ndarray,
        rows: int,
        dropped: np.ndarray,
    ) -> None:
        self.decide, self.rank, self.known, self.is_dup = decide, rank, known, is_dup
        self.share, self.dropped = DECIDED_ROWS / max(rows, 1), dropped
        self.removed: dict[float, float] = {}  # surely, and by huge groups
        self.sampled: dict[float, np.ndarray] = {}  # [now, in this run, of all in this run]
        self.huge: set[float] = set()

    def add(self, known: Block, threshold: float, largest: int) -> None:
        """Count the groups of a block, the ``largest`` of so many rows, at a threshold."""
        if np.float32(threshold) == np.float32(self.known):
            return
        block, removed = known.at(threshold), self.removed
        if self.share >= 1 and largest <= HUGE:
            members = self.decide(block, threshold)
            inside, count = members.row, float(members.is_dup.sum())
        else:
            inside, count = self.estimate(block, threshold)
        told = int(np.isin(self.dropped, inside).sum())
        removed[threshold] = removed.get(threshold, len(self.dropped)) + count - told

    def estimate(self, block: Block, threshold: float) -> tuple[np.ndarray, float]:
        """Return the rows of groups, and about how many of those of huge ones are removed."""
        row, group = components(block.whole_forest())
        if block.nearest is not None:
            lone = np.setdiff1d(block.nearest.row, row)
            row, group = np.append(row, lone), np.append(group, lone)
        order = np.lexsort((row, group))
        row, group = row[order], group[order]
        starts = group_starts(group)
        sizes = np.diff(starts)
        small = np.repeat(sizes <= HUGE, sizes)
        part = keep_rank(group, "random", 0) < self.share * 2.0**64
        members = self.decide(block.of(np.sort(row[small & part])), threshold)
        counts = [
            members.is_dup.sum(),
            self.is_dup[members.row].sum(),
            self.is_dup[row[small]].sum(),
        ]
        self.sampled[threshold] = self.sampled.get(threshold, np.zeros(3)) + counts
        count = 0.0
        for number in np.flatnonzero(sizes > HUGE).tolist():
            self.huge.add(threshold)
            whole = row[starts[number] : starts[number + 1]]
            members = self.decide(first_rows(block, whole, self.rank), threshold)
            now, then = members.is_dup.sum(), self.is_dup[members.row].sum()
            count += float(now / max(then, 1) * self.is_dup[whole].sum())
        return row, count

    def line(self, line: dict[str, Any], bounded: bool) -> dict[str, Any]:
        """Return a line of components as one of star; ``bounded``: it removes no more than they."""
        threshold, components, estimated = line["threshold"], line["removed"], False
        count = float(self.is_dup.sum())
        if np.float32(threshold) != np.float32(self.known):
            count = self.removed.get(threshold, float(len(self.dropped)))
            estimated = self.share < 1 or threshold in self.huge
        if threshold in self.sampled:
            now, then, every = self.sampled[threshold].tolist()
            count += now if self.share >= 1 else now / max(then, 1) * every
        if bounded and estimated:
            count = min(count, components + len(self.dropped))
        return line | {"removed": round(count), "components": components, "estimated": estimated}


def first_rows(block: Block, rows: np.ndarray, rank: Rank) -> Block:
    """Return the first rows in keep order of a group, (n,) int64, as a group of its own."""
    copied = np.isin(block.copies, rows)
    copies, originals = block.copies[copied], block.originals[copied]
    distinct = np.setdiff1d(rows, copies)
    some = np.sort(distinct[np.argsort(rank(distinct), kind="stable")[:HUGE]])
    chain = make_edges(some[:-1], some[1:], np.ones(len(some) - 1, np.float32))
    copied = np.isin(originals, some)
    near = block.of(some).nearest
    return Block(chain, copies[copied], originals[copied], near)
