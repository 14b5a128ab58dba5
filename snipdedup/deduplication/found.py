"""What a search found, before anything is decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.references import References
from snipdedup.groups.blocks import COPY, EDGE, Block, blocks_of_groups
from snipdedup.groups.members import Best, Nearest
from snipdedup.groups.star import Also
from snipdedup.join.forest import Edges, by_first, edge_kind, edges_of, join_edges, order_by
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Sorter, Spread, pack


@dataclass(frozen=True)
class Found:
    """What a search found, before anything is decided.

    Attributes
    ----------
    names, offsets : list of str, (shards + 1,) int64
        The shards: file names and first rows; the last offset is the number of rows.
    threshold : float
        The cosine searched for.
    forest : Edges
        Maximum spanning forest of the pairs among distinct rows.
    copies, firsts : (c,) int64
        Rows equal bit for bit to an earlier row, and the first such row.
    bad : (m,) int64
        Rows that cannot be compared.
    checksums : list of int
        Checksum of each shard; empty where no features were read.
    pairs : Edges, optional
        All pairs, where they could not be verified for lack of features.
    flags : (rows,) bool, optional
        The flags of method ``adc``.
    notes : dict
        The method's own figures, for the manifest.
    also : Also, optional
        What each pair had to match in besides.
    best : Best, optional
        What SemDeDup's rule looks at; its pairs are rows with their matches.
    references, nearest : References, Nearest, optional
        Rows that come first, and of each distinct row that matches one the nearest.
    text_checksums, reference_checksums : list of int
        Checksum of each shard of these, where this run read them.
    """

    names: list[str]
    offsets: np.ndarray
    threshold: float
    forest: Edges
    copies: np.ndarray
    firsts: np.ndarray
    bad: np.ndarray
    checksums: list[int] = field(default_factory=list)
    pairs: Edges | None = None
    flags: np.ndarray | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    also: Also | None = None
    best: Best | None = None
    references: References | None = None
    nearest: Nearest | None = None
    text_checksums: list[int] = field(default_factory=list)
    reference_checksums: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    @property
    def verified(self) -> bool:
        """Whether each pair was proved on the raw features."""
        return self.pairs is None

    def at(self, threshold: float) -> Found:
        """Return this as a search at a higher threshold would have found it."""
        nearest = None if self.nearest is None else self.nearest.at(threshold)
        forest = self.forest.at(threshold)
        return dataclasses.replace(self, forest=forest, nearest=nearest, threshold=threshold)

    def known(self, threshold: float) -> Block:
        """Return what decides at a threshold, as one block that may hold edges below it."""
        if self.best is None:
            return Block(self.forest, self.copies, self.firsts, self.nearest, self.pairs)
        none = np.empty(0, np.int64)  # copies are matches as others are
        return Block(self.best.edges(threshold), none, none)

    def is_large(self, threshold: float) -> bool:
        """Tell whether it is decided in more than one block, where there is a folder."""
        return self.known(threshold).size() > external_sort.HELD

    def blocks(self, threshold: float, folder: Path | None = None) -> Iterator[Block]:
        """Yield whole groups at a threshold, see `blocks_of_groups`."""
        level = threshold if self.verified and self.best is None else -np.inf
        yield from blocks_of_groups(self.known(threshold), level, self.rows, folder)

    @property
    def edge_count(self) -> int:
        """Edges of the forest with exact copies."""
        known = self.known(self.threshold)
        return len(known.forest.a) + len(known.copies)

    def first_of(self, rows: np.ndarray) -> np.ndarray:
        """Return for each row the first that equals it bit for bit, often the row itself."""
        if not len(self.copies):
            return rows
        place = np.minimum(np.searchsorted(self.copies, rows), len(self.copies) - 1)
        return np.where(self.copies[place] == rows, self.firsts[place], rows)

    def edges(self, folder: Path | None = None) -> Iterator[Edges]:
        """Yield the forest with exact copies, ordered by (a, b), some at a time."""
        known, kind = self.known(self.threshold), edge_kind(self.rows)
        spread = Spread(known.size(), 0, self.rows)
        sorter = Sorter(folder and folder / "edges", kind, by_first, spread=spread)
        for what, part in known.parts(-np.inf):
            if what in (EDGE, COPY):
                sorter.add(pack(kind, *part))
        for records in sorter.ascending():
            edges = edges_of(records)
            yield edges.where(order_by(edges.a, edges.b))

    @cached_property
    def whole_forest(self) -> Edges:
        """The forest with exact copies, ordered by (a, b)."""
        return join_edges(list(self.edges()))
