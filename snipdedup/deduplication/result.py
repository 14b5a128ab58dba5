"""What was decided: which rows of the groups that were found stay, and another threshold anew.

Groups are decided a block at a time. Nothing is computed twice: ratios and tables derive from the
forest, the copies and the members.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.config import Dedup
from snipdedup.deduplication.counts import Tally, count
from snipdedup.deduplication.final_check import prove
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.tables import forest_table, groups_table
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.blocks import Block, collect, slices
from snipdedup.groups.keep import ColumnRank, rank_by
from snipdedup.groups.members import Copies, Members, Rank
from snipdedup.groups.star import (
    Compare,
    group_components,
    group_matches,
    group_star,
    refer_components,
    refer_star,
    star_from_pairs,
)
from snipdedup.join.forest import components
from snipdedup.metadata.additions import Removed
from snipdedup.storage.external_sort import Columns, Sorter, Spread, pack, row_kind

MASK_ROWS = 1 << 24  # of the mask, made at a time
STEP = 0.001  # between thresholds that --keep_fraction tries


@dataclass(frozen=True)
class Result:
    """The decision for each row.

    Attributes
    ----------
    found : Found
    features : Features or None
        The rows that were searched.
    members : Members
        The rows of groups of two or more.
    threshold, grouping, keep, seed
        What was decided by.
    rank : function of (n,) int64 rows
        Their place in keep order.
    folder : Path, optional
        Where what does not fit into memory lies; None: all is held.
    near : (members,) float32, optional
        Cosine of each member with its nearest reference row; NaN where none matches.
    """

    found: Found
    features: Features | None
    members: Members
    threshold: float
    grouping: str
    keep: str
    seed: int
    rank: Rank
    folder: Path | None = None
    near: np.ndarray | None = None

    @cached_property
    def tally(self) -> Tally:
        """What there is to count."""
        return count(self.members, self.threshold)

    @cached_property
    def gone(self) -> Removed:
        """The rows that go, ascending, and what stands for each; many are mapped."""
        kind = np.dtype([("row", row_kind(self.rows)), ("representative", "<i8")])
        spread = Spread(self.removed, 0, self.rows)
        path = self.folder and self.folder / "gone"
        by_row = Sorter(path, kind, lambda r: r["row"].astype(np.uint64), spread=spread)
        for part in slices(self.members):
            goes = part.is_dup
            by_row.add(pack(kind, part.row[goes], part.representative[goes]))
        columns = Columns(path, {"row": "<i8", "representative": "<i8"})
        for records in by_row.ascending():
            order = np.argsort(records["row"])
            columns.add(records["row"][order], records["representative"][order])
        return Removed(*columns.arrays())

    def mask(self) -> Iterator[np.ndarray]:
        """Yield which rows go, (rows,) bool, some at a time."""
        for start, stop in plan_blocks(self.rows, MASK_ROWS):
            low, high = np.searchsorted(self.gone.row, [start, stop])
            mask = np.zeros(stop - start, bool)
            mask[self.gone.row[low:high] - start] = True
            yield mask

    @cached_property
    def is_dup(self) -> np.ndarray:
        """True for each row to remove, (rows,) bool."""
        return np.concatenate([np.empty(0, bool), *self.mask()])

    @property
    def rows(self) -> int:
        """Number of rows of the input."""
        return self.found.rows

    @property
    def removed(self) -> int:
        """Number of rows to remove."""
        return self.tally.removed

    @property
    def kept(self) -> int:
        """Number of rows that stay."""
        return self.rows - self.removed

    @property
    def duplicate_ratio(self) -> float:
        """Share of the rows to remove."""
        return self.removed / self.rows

    @property
    def forest(self) -> Any:
        """The forest as a ``pyarrow.Table``: a, b int64, similarity float32."""
        return forest_table(self.found, self.found.whole_forest)

    @property
    def groups(self) -> Any:
        """The members as a ``pyarrow.Table``, see ``docs/files.md``."""
        return groups_table(self.found, self.members, None, self.near)

    @property
    def chained(self) -> int:
        """Removed rows whose cosine with their representative is below the threshold."""
        return self.tally.chained

    def at(self, threshold: float, grouping: str | None = None) -> Result:
        """Decide again at another threshold, without a search.

        Parameters
        ----------
        threshold : float
            Not below the one searched for.
        grouping : str, optional
            ``star`` reads the raw rows of groups again; ``components`` needs the forest alone.

        Raises
        ------
        SnipError
            If the threshold is below the one searched for.
        UsageError
            If there is no such threshold or grouping.
        """
        grouping = self.grouping if grouping is None else grouping
        by_rule = self.found.best is not None  # then grouping does not apply
        Dedup(features="", threshold=threshold, grouping=None if by_rule else grouping)
        known = (self.keep, self.seed, self.rank)
        return decide(self.found, self.features, threshold, grouping, *known)


def decide(
    found: Found,
    features: Features | None,
    threshold: float,
    grouping: str,
    keep: str,
    seed: int,
    rank: Rank | None = None,
    folder: Path | None = None,
) -> Result:
    """Group what was found, choose which rows stay, and prove that the others go rightly.

    Parameters
    ----------
    found, features, threshold, grouping, keep, seed
        As `Result` has them.
    rank : function of (n,) int64 rows, optional
        The keep order; needed where ``keep`` names columns of the metadata.
    folder : Path, optional
        For what does not fit into memory; None: all is held.

    Raises
    ------
    SnipError
        If the threshold is below the one searched for, or pairs are unverified and another
        threshold is asked for.
    InternalError
        If a row would go without a reason.
    """
    return proved(choose(found, features, threshold, grouping, keep, seed, rank, folder))


def proved(result: Result) -> Result:
    """Return a result with its cosines, each computed from the raw rows; see `proving.prove`."""
    members, near = prove(
        result.found, result.features, result.members, result.threshold, result.grouping,
        result.folder,
    )  # fmt: skip
    return dataclasses.replace(result, members=members, near=near)


def choose(
    found: Found,
    features: Features | None,
    threshold: float,
    grouping: str,
    keep: str,
    seed: int,
    rank: Rank | None = None,
    folder: Path | None = None,
) -> Result:
    """Choose which rows stay as `decide` does, a block of groups at a time; nothing is proved."""
    check_threshold(found, threshold)
    rank = rank or rank_by("first" if found.best else keep, seed, None)
    if folder is not None and isinstance(rank, ColumnRank) and found.is_large(threshold):
        rank.keep_keys(folder)

    def parts() -> Iterator[Members]:
        with progress.bar(len(found.forest.a), "grouping", "edges") as bar:
            for block in found.blocks(threshold, folder):
                yield decide_block(found, block, features, threshold, grouping, rank, bar.update)

    return Result(
        found, features, collect(parts(), folder), threshold, grouping, keep, seed, rank, folder
    )


def decide_fraction(found: Found, fraction: float, decide_at: Callable[[float], Result]) -> Result:
    """Decide at the lowest threshold, in steps of .001 up to 1, at which a share of rows stays.

    Raises
    ------
    SnipError
        If more stay at the searched threshold already, or fewer at all thresholds up to 1.
    """
    rows, result = found.rows, decide_at(found.threshold)
    if result.kept / rows > fraction:
        raise SnipError(
            f"{result.kept / rows:.4%} of the rows stay already at threshold "
            f"{found.threshold:g}, more than --keep_fraction {fraction:g}; search again at a lower "
            "--threshold"
        )
    while result.kept / rows < fraction:
        if result.threshold >= 1:
            raise SnipError(
                f"{result.kept / rows:.4%} of the rows stay at threshold {result.threshold:g}, and "
                f"there is no higher one; expected at least --keep_fraction {fraction:g}"
            )
        result = decide_at(min(1.0, round(result.threshold + STEP, 6)))
    return result


def check_threshold(found: Found, threshold: float) -> None:
    """Refuse a threshold below the one that was searched for; SemDeDup's rule knows all.

    Pairs that were never verified have one threshold only.
    """
    if not found.verified and threshold != found.threshold:
        raise SnipError("unverified pairs have no cosines; search with FEATURES to re-threshold")
    if found.best is None and np.float32(threshold) < np.float32(found.threshold):
        raise SnipError(
            f"the search was made at threshold {found.threshold:g}, pairs below it are unknown; "
            f"expected {found.threshold:g} or more, found {threshold:g}: search again"
        )


def decide_block(
    found: Found,
    block: Block,
    features: Features | None,
    threshold: float,
    grouping: str,
    rank: Rank,
    done: Callable[[int], None],
) -> Members:
    """Decide whole groups; ``done`` is told how many edges of their forest are settled."""
    if found.best is not None:
        return group_matches(block.forest, found.best, threshold)
    if block.pairs is None:
        compare = None if features is None else Compare(features.gather, threshold, found.also)
        return decide_verified(block, compare, grouping, rank, done)
    copies = Copies(block.copies, block.firsts, rank)
    if grouping == "components":
        return copies.unfold(group_components(block.forest, rank))
    row, group = components(block.forest)
    return copies.unfold(star_from_pairs(row, group, rank(row), block.pairs))


def decide_verified(
    block: Block,
    compare: Compare | None,
    grouping: str,
    rank: Rank,
    done: Callable[[int], None],
) -> Members:
    """Group pairs that were proved; exact copies are folded away before and back after."""
    copies = Copies(block.copies, block.firsts, rank)
    forest = copies.fold(block.forest)
    nearest = None if block.nearest is None else copies.fold_nearest(block.nearest)
    if grouping == "components":
        members = group_components(forest, rank)
        done(len(forest.a))
        return copies.unfold(refer_components(members, nearest) if nearest else members)
    if compare is None:
        raise SnipError("star grouping compares raw rows: give the features, or use components")
    members = group_star(forest, rank, compare, done, nearest.row if nearest else None)
    return copies.unfold(refer_star(members, nearest) if nearest else members)
