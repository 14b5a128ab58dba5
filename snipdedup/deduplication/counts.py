"""What there is to count: over the members of groups, and over the forest at other thresholds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.deduplication.found import Found
from snipdedup.groups.blocks import slices
from snipdedup.groups.members import Members, group_starts
from snipdedup.join.forest import Edges, link_smaller, number_ends


class Tally(NamedTuple):
    """What members amount to.

    Attributes
    ----------
    removed, chained : int
        Rows that go; of these, those below the threshold to what stands for them.
    for_reference : int
        Rows that go for a row of a reference.
    sizes : mapping of int to int
        How many groups have each size.
    named : mapping of int to int
        How many rows that stay stand for each number of others.
    """

    removed: int
    chained: int
    for_reference: int
    sizes: Mapping[int, int]
    named: Mapping[int, int]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Rows of the largest group; 1 without any."""
        return max(self.sizes, default=1)


def count(members: Members, threshold: float) -> Tally:
    """Count members; a representative that is a row of the set lies in its group."""
    removed = chained = for_reference = 0
    sizes: Counter[int] = Counter()
    named: Counter[int] = Counter()
    for part in slices(members):
        gone = part.representative[part.is_dup]
        removed += len(gone)
        chained += int((part.similarity[part.is_dup] < np.float32(threshold)).sum())
        for_reference += int((gone < 0).sum())
        sizes.update(counted(np.diff(group_starts(part.group))))
        row, stands_for = np.unique(gone[gone >= 0], return_counts=True)
        named.update(counted(stands_for[~np.isin(row, part.row[part.is_dup])]))
    return Tally(removed, chained, for_reference, sizes, named)


def counted(values: np.ndarray) -> dict[int, int]:
    """Return how often each value occurs."""
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class Level:
    """One line of the threshold table: what components would remove."""

    threshold: float
    removed: int
    groups: int
    largest: int


def levels(found: Found, thresholds: list[float], folder: Path | None = None) -> list[Level]:
    """Return, for each threshold, what the components of the forest amount to."""
    lines = [Level(threshold, 0, 0, 1) for threshold in thresholds]
    if not lines:
        return lines
    for block in found.blocks(found.threshold, folder):
        for number, sizes in component_sizes(block.whole_forest(), thresholds):
            line = lines[number]
            lines[number] = Level(
                line.threshold,
                line.removed + int(sizes.sum()) - len(sizes),
                line.groups + len(sizes),
                max(line.largest, int(sizes.max(initial=1))),
            )
    return lines


def component_sizes(forest: Edges, thresholds: Sequence[float]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the place of each threshold, and the rows of each component of two or more there.

    From the highest threshold to the lowest, so that each edge is looked at once.
    """
    count, a, b = number_ends(forest)
    label, above = np.arange(count), np.float32(np.inf)
    for number in np.argsort(thresholds)[::-1]:
        least = np.float32(thresholds[number])
        new = np.flatnonzero((forest.similarity >= least) & (forest.similarity < above))
        link_smaller(label, label[a[new]], label[b[new]])
        sizes, above = np.bincount(label, minlength=1), least
        yield int(number), sizes[sizes > 1]


def as_json(lines: list[Level]) -> list[dict[str, Any]]:
    """Return a threshold table as JSON values."""
    return [dataclasses.asdict(line) for line in lines]
