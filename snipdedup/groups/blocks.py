"""Groups in blocks: what was found is cut into blocks of whole groups, and so are members.

Few enough rows are one block. Of more, the group of each row is found first, in four bytes a row;
edges, copies and all else then wait in files, sorted by group. So whatever is decided within groups
needs no more memory than a block, or the largest group.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.features.shards import plan_blocks
from snipdedup.groups.members import Members, Nearest
from snipdedup.join.forest import BLOCK_EDGES, Edges, UnionFind, join_edges, order_by
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Columns, Sorter, Spread, pack, row_kind

EDGE, COPY, NEAREST, PAIR = range(4)  # what a record in a file is
KINDS = {
    "row": "<i8", "group": "<i8", "representative": "<i8", "similarity": "<f4", "is_dup": "?",
}  # fmt: skip


class Block(NamedTuple):
    """Whole groups, and what is known of their rows; all groups together are a block too."""

    forest: Edges  # over distinct rows
    copies: np.ndarray  # (c,) int64, ascending: rows that equal an earlier row bit for bit
    originals: np.ndarray  # (c,) int64: the first row that each one equals
    nearest: Nearest | None = None  # of each distinct row that matches a reference row
    pairs: Edges | None = None  # all pairs, where they could not be verified

    def at(self, threshold: float) -> Block:
        """Return the edges and nearest rows with a cosine of float32(threshold) or more."""
        nearest = None if self.nearest is None else self.nearest.at(threshold)
        return self._replace(forest=self.forest.at(threshold), nearest=nearest)

    def whole_forest(self) -> Edges:
        """Return the forest with exact copies, ordered by (a, b)."""
        ones = np.ones(len(self.copies), np.float32)
        edges = join_edges([self.forest, Edges(self.originals, self.copies, ones)])
        return edges.where(order_by(edges.a, edges.b))

    def parts(self, threshold: float) -> Iterator[tuple[int, Edges]]:
        """Yield what it holds as edges, some at a time, each part with what these are."""
        nearest = [] if self.nearest is None else [(NEAREST, Edges(*self.nearest))]
        for what, edges in [(EDGE, self.forest), *nearest]:
            for start, stop in plan_blocks(len(edges.a), BLOCK_EDGES):
                yield what, edges.where(slice(start, stop)).at(threshold)
        for start, stop in plan_blocks(len(self.copies), BLOCK_EDGES):
            ends = self.originals[start:stop], self.copies[start:stop]
            yield COPY, Edges(*ends, np.ones(stop - start, np.float32))
        if self.pairs is not None:
            for start, stop in plan_blocks(len(self.pairs.a), BLOCK_EDGES):
                yield PAIR, self.pairs.where(slice(start, stop))

    def size(self) -> int:
        """Return how many edges, copies and other entries it holds."""
        others = sum(len(other[0]) for other in (self.nearest, self.pairs) if other is not None)
        return len(self.forest.a) + len(self.copies) + others


def blocks_of_groups(
    known: Block, threshold: float, rows: int, folder: Path | None
) -> Iterator[Block]:
    """Yield whole groups at a threshold, by their smallest rows ascending.

    ``known`` are all groups, at a threshold no higher; ``rows`` is how many the set has. What does
    not fit into memory goes to ``folder``; without one, all is one block.
    """
    if folder is None or known.size() <= external_sort.HELD:
        yield known.at(threshold)
        return
    row, other = row_kind(rows), "<i8" if known.nearest is not None else row_kind(rows)
    fields = {"label": row, "what": "u1", "a": row, "b": other, "similarity": "<f4"}
    kind = np.dtype(list(fields.items()))
    spread = Spread(known.size(), 0, rows)
    waiting = Sorter(folder / "groups", kind, lambda r: r["label"].astype(np.uint64), spread=spread)
    sets = UnionFind(rows)
    for what, part in known.parts(threshold):
        if what in (EDGE, COPY):
            sets.unite(part.a, part.b)
    labels = sets.labels()  # the smallest row of each row's group
    for what, part in known.parts(threshold):
        whats = np.full(len(part.a), what, np.uint8)
        waiting.add(pack(kind, labels[part.a], whats, *part))
    del labels, sets
    for records in waiting.ascending():
        yield block_of(records, known)


def block_of(records: np.ndarray, known: Block) -> Block:
    """Return records of a file as a block, ordered as all of it is."""

    def some(what: int, by: str) -> Edges:
        part = records[records["what"] == what]
        part = part[np.argsort(part[by], kind="stable")]
        a, b = (part[name].astype(np.int64) for name in ("a", "b"))
        return Edges(a, b, part["similarity"].astype(np.float32))

    edges, copies = some(EDGE, "a"), some(COPY, "b")
    return Block(
        edges.where(order_by(edges.a, edges.b)),
        copies.b,
        copies.a,
        None if known.nearest is None else Nearest(*some(NEAREST, "a")),
        None if known.pairs is None else some(PAIR, "a"),
    )


def collect(parts: Iterator[Members], folder: Path | None) -> Members:
    """Return the members of blocks as one list; a long one is mapped from ``folder``."""
    columns = Columns(folder and folder / "members", KINDS)
    for members in parts:
        columns.add(*members)
    return Members(*columns.arrays())


def cut_groups(group: np.ndarray) -> np.ndarray:
    """Return where to cut a sorted array of labels so that no group is cut, ends included.

    Between two cuts lie at most `external_sort.HELD` members, or one group.
    """
    cuts, most = [0], external_sort.HELD
    while cuts[-1] + most < len(group):
        stop = cuts[-1] + most
        begin = int(np.searchsorted(group, group[stop]))
        if begin <= cuts[-1]:
            begin = max(stop, int(np.searchsorted(group, group[stop], side="right")))
        cuts.append(begin)
    return np.array(cuts + [len(group)] * (len(group) > cuts[-1] or len(cuts) == 1), np.int64)


def slices(members: Members) -> Iterator[Members]:
    """Yield members some at a time, whole groups; at least once."""
    cuts = cut_groups(members.group).tolist()
    for start, stop in pairwise(cuts):
        yield Members(*(np.asarray(column[start:stop]) for column in members))
