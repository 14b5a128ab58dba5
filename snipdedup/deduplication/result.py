"""The decision: which rows of each group are removed, and again at another threshold.

Groups are decided a block at a time. Counts and tables derive from the forest, the copies and the
members of groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.config import Dedup
from snipdedup.deduplication.counts import Counts, count_members, levels, summarize
from snipdedup.deduplication.final_check import fill_similarity
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.tables import forest_table, groups_table
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features
from snipdedup.groups.blocks import Block, collect, slices
from snipdedup.groups.keep import ColumnRank
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
from snipdedup.metadata.additions import RemovedRows
from snipdedup.storage.external_sort import Columns, Sorter, Spread, pack, row_kind

STEP = 0.001  # between thresholds that --keep_fraction tries
TABLE_STEPS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)  # above the searched threshold, in the summary


@dataclass(frozen=True)
class Result:
    """The decision for each row; ``print`` shows the summary.

    Attributes
    ----------
    search : PairSearch
    features : Features or None
        The rows that were searched.
    members : Members
        The rows of groups of two or more.
    threshold, grouping, keep
        The settings of the decision.
    rank : function of (n,) int64 rows
        Their place in keep order.
    folder : Path, optional
        For arrays that do not fit into memory; None: all is held.
    near : (members,) float32, optional
        Cosine of each member with its nearest reference row; NaN where none matches.
    manifest : dict, optional
        Of the folder that it was written to.
    out : Path, optional
        That folder.
    """

    search: PairSearch
    features: Features | None
    members: Members
    threshold: float
    grouping: str
    keep: str
    rank: Rank
    folder: Path | None = None
    near: np.ndarray | None = None
    manifest: dict[str, Any] | None = None
    out: Path | None = None

    def __str__(self) -> str:
        text = summarize(self.entries() if self.manifest is None else self.manifest)
        return text if self.out is None else f"{text}\nwritten to {self.out}"

    @cached_property
    def counts(self) -> Counts:
        """Numbers of rows and groups."""
        return count_members(self.members, self.threshold)

    @cached_property
    def removed_rows(self) -> RemovedRows:
        """The removed rows, ascending, and the representative of each; many are mapped."""
        kind = np.dtype([("row", row_kind(self.rows)), ("representative", "<i8")])
        spread = Spread(self.removed, 0, self.rows)
        path = self.folder and self.folder / "removed"
        by_row = Sorter(path, kind, lambda r: r["row"].astype(np.uint64), spread=spread)
        for part in slices(self.members):
            by_row.add(pack(kind, part.row[part.is_dup], part.representative[part.is_dup]))
        columns = Columns(path, {"row": "<i8", "representative": "<i8"})
        for records in by_row.ascending():
            order = np.argsort(records["row"])
            columns.add(records["row"][order], records["representative"][order])
        return RemovedRows(*columns.arrays())

    @cached_property
    def is_dup(self) -> np.ndarray:
        """True for each row to remove, (rows,) bool."""
        is_dup = np.zeros(self.rows, bool)
        for part in slices(self.members):
            is_dup[part.row[part.is_dup]] = True
        return is_dup

    @property
    def rows(self) -> int:
        """Number of rows of the input."""
        return self.search.rows

    @property
    def removed(self) -> int:
        """Number of rows to remove."""
        return self.counts.removed

    @property
    def kept(self) -> int:
        """Number of rows to keep."""
        return self.rows - self.removed

    @property
    def duplicate_ratio(self) -> float:
        """Share of the rows to remove."""
        return self.removed / self.rows

    @property
    def chained(self) -> int:
        """Removed rows whose cosine with their representative is below the threshold."""
        return self.counts.chained

    @property
    def forest(self) -> Any:
        """The forest as a ``pyarrow.Table``: a, b int64, similarity float32."""
        return forest_table(self.search, self.search.whole_forest)

    @property
    def groups(self) -> Any:
        """The members as a ``pyarrow.Table``, see ``docs/files.md``."""
        return groups_table(self.search, self.members, None, self.near)

    def at(self, threshold: float, grouping: str | None = None) -> Result:
        """Decide again at another threshold, without a search.

        Parameters
        ----------
        threshold : float
            Not below the one searched for.
        grouping : str, optional
            ``star`` reads the raw rows of groups again; ``components`` needs the forest alone.
        """
        grouping = self.grouping if grouping is None else grouping
        by_rule = self.search.best is not None  # then grouping does not apply
        Dedup(features="", threshold=threshold, grouping=None if by_rule else grouping)
        known = (self.keep, self.rank)
        return checked(choose(self.search, self.features, threshold, grouping, *known))

    def entries(self, epsilons: Sequence[float] = (), folder: Path | None = None) -> dict[str, Any]:
        """Return what a manifest holds of the result, as JSON values.

        ``epsilons`` are those tabulated by SemDeDup's rule; the result's own without any.
        """
        search, references, counts = self.search, self.search.references, self.counts
        steps = [round(search.threshold + step, 6) for step in TABLE_STEPS]
        by_forest = search.verified and search.best is None and not search.references_only
        table = [t for t in steps if search.threshold <= t <= 1] if by_forest else []
        more = {} if references is None else {
            "reference_rows": references.rows, "removed_for_reference": counts.for_reference
        }  # fmt: skip
        return {
            "verified": search.verified,
            "settings": {
                "threshold": self.threshold,
                "grouping": self.grouping,
                "keep": self.keep,
                "references_only": search.references_only,
            },
            "counts": {
                "rows": self.rows,
                "removed": self.removed,
                "kept": self.kept,
                "groups": counts.groups,
                "largest_group": counts.largest,
                "exact_copies": len(search.copies),
                "bad_rows": len(search.bad),
                "chained": self.chained,
                "forest_edges": search.edge_count,
                **more,
            },
            "thresholds": [dataclasses.asdict(line) for line in levels(search, table, folder)],
            "epsilons": [
                {"epsilon": epsilon, "removed": int(search.best.removed(1 - epsilon).sum())}
                for epsilon in epsilons or [round(1 - self.threshold, 9)]
                if search.best is not None
            ],
            "method": search.notes,
        }


def checked(result: Result) -> Result:
    """Return a result with its cosines, each computed from the raw rows.

    Raises
    ------
    InternalError
        If a row would be removed without a reason; see `final_check`.
    """
    members, near = fill_similarity(
        result.search, result.features, result.members, result.threshold, result.grouping,
        result.folder,
    )  # fmt: skip
    return dataclasses.replace(result, members=members, near=near)


def choose(
    search: PairSearch,
    features: Features | None,
    threshold: float,
    grouping: str,
    keep: str,
    rank: Rank,
    folder: Path | None = None,
) -> Result:
    """Choose which rows of the groups are removed, a block of groups at a time, unchecked.

    The parameters are fields of `Result`.
    """
    check_threshold(search, threshold)
    if folder is not None and isinstance(rank, ColumnRank) and search.is_large(threshold):
        rank.read_all(folder)

    def parts() -> Iterator[Members]:
        with progress.bar(len(search.forest.a), "grouping", "edges") as bar:
            for block in search.blocks(threshold, folder):
                yield decide_block(search, block, features, threshold, grouping, rank, bar.update)

    members = collect(parts(), folder)
    return Result(search, features, members, threshold, grouping, keep, rank, folder)


def choose_fraction(
    search: PairSearch, fraction: float, choose_at: Callable[[float], Result]
) -> Result:
    """Choose at the lowest threshold, in steps of .001 up to 1, at which a share of rows is kept.

    It is refused if more are kept at the searched threshold already, or fewer at 1.
    """
    result = choose_at(search.threshold)
    if result.kept / search.rows > fraction:
        raise SnipError(
            f"{result.kept / search.rows:.4%} of the rows are kept already at threshold "
            f"{search.threshold:g}, more than --keep_fraction {fraction:g}; search again at a "
            "lower --threshold"
        )
    while result.kept / search.rows < fraction:
        if result.threshold >= 1:
            raise SnipError(
                f"{result.kept / search.rows:.4%} of the rows are kept at threshold "
                f"{result.threshold:g}, and there is no higher one; expected at least "
                f"--keep_fraction {fraction:g}"
            )
        result = choose_at(min(1.0, round(result.threshold + STEP, 6)))
    return result


def check_threshold(search: PairSearch, threshold: float) -> None:
    """Refuse a threshold below the one that was searched for; SemDeDup's rule knows all.

    Pairs that were never verified have one threshold only.
    """
    if not search.verified and threshold != search.threshold:
        raise SnipError("unverified pairs have no cosines; search with FEATURES to re-threshold")
    if search.best is None and np.float32(threshold) < np.float32(search.threshold):
        raise SnipError(
            f"the search was made at threshold {search.threshold:g}, pairs below it are unknown; "
            f"expected {search.threshold:g} or more, found {threshold:g}: search again"
        )


def decide_block(
    search: PairSearch,
    block: Block,
    features: Features | None,
    threshold: float,
    grouping: str,
    rank: Rank,
    done: Callable[[int], None],
) -> Members:
    """Decide whole groups; ``done`` takes how many edges of their forest are decided.

    Exact copies are folded away before and unfolded after.
    """
    if search.best is not None:
        return group_matches(block.forest, search.best, threshold)
    copies = Copies(block.copies, block.originals, rank)
    forest = copies.fold(block.forest)
    nearest = None if block.nearest is None else copies.fold_nearest(block.nearest)
    if grouping == "components":
        members = group_components(forest, rank)
        done(len(forest.a))
        return copies.unfold(refer_components(members, nearest) if nearest else members)
    if block.pairs is not None:
        row, group = components(forest)
        return copies.unfold(star_from_pairs(row, group, rank(row), block.pairs))
    if features is None:
        raise SnipError("star grouping compares raw rows: give the features, or use components")
    compare = Compare(features.gather, threshold, search.also)
    members = group_star(forest, rank, compare, done, nearest.row if nearest else None)
    return copies.unfold(refer_star(members, nearest) if nearest else members)
