"""The decision: which rows of each group are removed, and again at another threshold.

Groups are decided a block at a time. Counts and tables derive from the forest, the copies and the
members of groups.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.config import Dedup
from snipdedup.deduplication.decisions import Decisions, add_lone, decide_again
from snipdedup.deduplication.final_check import fill_similarity
from snipdedup.deduplication.levels import StarCount, tabulate
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.read_out import pick
from snipdedup.deduplication.shown import Shown
from snipdedup.deduplication.summary import summarize
from snipdedup.errors import SnipError
from snipdedup.groups import star
from snipdedup.groups.keep import ColumnRank
from snipdedup.groups.members import (
    KINDS,
    Block,
    Copies,
    Members,
    Nearest,
    Rank,
    group_starts,
    no_members,
    refer_components,
    refer_star,
    slices,
    sorted_by_row,
)
from snipdedup.join.forest import components
from snipdedup.metadata.additions import RemovedPairs
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Columns

STEP = 0.001  # between thresholds that --keep_fraction tries
TABLE_STEPS = (0.0, 0.01, 0.02, 0.03, 0.04)  # above the searched threshold, in the summary


class Counts(NamedTuple):
    """Numbers of removed rows and of groups."""

    removed: int
    chained: int  # of these, those below the threshold to their representative
    for_reference: int  # of these, those removed for a reference row
    alone: int  # of these, those told to go that duplicate no row that stays
    sizes: Mapping[int, int]  # how many groups have each size
    represented: Mapping[int, int]  # how many kept rows represent each number of others


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """The decision for each row; ``print`` shows the summary."""

    search: PairSearch
    members: Members  # the rows of groups of two or more
    threshold: float
    grouping: str
    keep: str
    rank: Rank  # function of (n,) int64 rows: their place in keep order
    folder: Path | None = None  # for arrays that do not fit into memory; None: all is held
    near: np.ndarray | None = None  # (members,) float32: cosine with the nearest reference, or NaN
    also: Sequence[np.ndarray] = ()  # of each second features, (members,) float32; NaN of kept rows
    threshold_from: str = "given"  # see `settings.fill_settings`
    options: Dedup | None = None  # the settings that made it, filled
    decisions: Decisions | None = None  # what a person decided
    manifest: dict[str, Any] | None = None  # of the folder that it was written to
    out: Path | None = None  # that folder

    def __str__(self) -> str:
        text = summarize(self.entries() if self.manifest is None else self.manifest)
        return text if self.out is None else f"{text}\nwritten to {self.out}"

    @cached_property
    def counts(self) -> Counts:
        """Numbers of rows and groups."""
        removed = chained = for_reference = alone = 0
        sizes: Counter[int] = Counter()
        represented: Counter[int] = Counter()
        for part in slices(self.members):
            named = part.representative[part.is_dup]  # a row of the set lies in the same group
            removed += len(named)
            chained += int((part.similarity[part.is_dup] < np.float32(self.threshold)).sum())
            for_reference += int((named < 0).sum())
            alone += int((named == part.row[part.is_dup]).sum())
            sizes.update(np.diff(group_starts(part.group)).tolist())
            row, count = np.unique(named[named >= 0], return_counts=True)
            represented.update(count[~np.isin(row, part.row[part.is_dup])].tolist())
        return Counts(removed, chained, for_reference, alone, sizes, represented)

    @cached_property
    def removed_rows(self) -> RemovedPairs:
        """Removed rows, ascending, and the representative of each, if another; many are mapped."""
        parts = (
            pick(part, part.is_dup & (part.representative != part.row))
            for part in slices(self.members)
        )
        removed = ((part.row, part.representative) for part in parts)
        kinds = {"row": "<i8", "representative": "<i8"}
        path = self.folder and self.folder / "removed"
        return RemovedPairs(*sorted_by_row(removed, kinds, self.removed, self.rows, path))

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
        return self.search.forest_table(self.search.whole_forest)

    @property
    def groups(self) -> Any:
        """The members as a ``pyarrow.Table``, see ``docs/files.md``."""
        return self.search.groups_table(self.members, None, self.near, self.also, self.decisions)

    def at(self, threshold: float, grouping: str | None = None) -> Result:
        """Decide again at another threshold, not below the one searched for, without a search.

        ``grouping`` stays as it was unless given: ``star`` reads the raw rows of groups again;
        ``components`` needs the forest alone.
        """
        grouping = self.grouping if grouping is None else grouping
        by_rule = self.search.best is not None  # then grouping does not apply
        Dedup(features="", threshold=threshold, grouping=None if by_rule else grouping)
        how = threshold, grouping, self.keep, self.rank, None, self.decisions
        return dataclasses.replace(checked(choose(self.search, *how)), options=self.options)

    def star_count(self) -> StarCount | None:
        """Return what counts the rows that star removes at other thresholds; None by components."""
        if self.grouping != "star":
            return None
        given = self.search, self.grouping, self.rank, self.decisions
        dropped = np.empty(0, np.int64) if self.decisions is None else self.decisions.dropped

        def decide(block: Block, threshold: float) -> Members:
            return decide_groups(*given, block, threshold, lambda edges: None, named=False)

        rows = self.search.whole_block(self.threshold).size()
        return StarCount(decide, self.rank, self.threshold, self.is_dup, rows, dropped)

    def entries(self, epsilons: Sequence[float] = (), folder: Path | None = None) -> dict[str, Any]:
        """Return what a manifest holds of the result, as JSON values.

        ``epsilons`` are those tabulated by SemDeDup's rule; the result's own without any.
        """
        search, references, counts = self.search, self.search.inputs.references, self.counts
        forest, more = search.whole_block(search.threshold), {}
        steps = [
            round(search.threshold + step, 6) if step else search.threshold for step in TABLE_STEPS
        ]
        by_forest = search.verified and search.best is None and not search.references_only
        table = [t for t in steps if search.threshold <= t <= 1] if by_forest else []
        if references is not None:
            more["reference_rows"] = references.rows
            more["removed_for_reference"] = counts.for_reference
        if self.decisions is not None:
            more["told_to_stay"], more["told_to_go"] = map(len, self.decisions)
            more["removed_alone"] = counts.alone
        return {
            "verified": search.verified,
            "threshold_from": self.threshold_from,
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
                "groups": sum(counts.sizes.values()),
                "largest_group": max(counts.sizes, default=1),
                "exact_copies": len(search.copies),
                "bad_rows": len(search.bad),
                "chained": self.chained,
                "forest_edges": len(forest.forest.a) + len(forest.copies),
                **more,
            },
            "thresholds": tabulate(search, table, folder, self.star_count() if table else None),
            "epsilons": [
                {"epsilon": epsilon, "removed": int(search.best.removed(1 - epsilon).sum())}
                for epsilon in epsilons or [round(1 - self.threshold, 9)]
                if search.best is not None
            ],
            "method": search.notes,
        }


def checked(result: Result) -> Result:
    """Return a result with its cosines, each computed from the raw rows.

    A row that would be removed without a reason is an `InternalError`; see `final_check`.
    """
    dropped = np.empty(0, np.int64) if result.decisions is None else result.decisions.dropped
    members, near, also = fill_similarity(
        result.search, result.members, result.threshold, result.grouping, result.folder, dropped
    )
    return dataclasses.replace(result, members=members, near=near, also=also)


def choose(
    search: PairSearch,
    threshold: float,
    grouping: str,
    keep: str,
    rank: Rank,
    folder: Path | None = None,
    decisions: Decisions | None = None,
) -> Result:
    """Choose which rows of the groups are removed, a block of groups at a time, unchecked.

    The parameters are fields of `Result`.
    """
    check_threshold(search, threshold)
    whole = search.whole_block(threshold)
    large, edges = whole.size() > external_sort.HELD, len(whole.forest.a)
    del whole
    if folder is not None and isinstance(rank, ColumnRank) and large:
        rank.read_all(folder)

    columns = Columns(folder and folder / "members", KINDS)
    lone = np.empty(0, np.int64) if decisions is None else decisions.dropped  # in no group so far
    with progress.bar(edges, "grouping", "edges") as bar:
        for block in search.blocks(threshold, folder):
            how = search, grouping, rank, decisions
            members = decide_groups(*how, block, threshold, bar.update)
            if decisions is not None:
                lone = lone[~np.isin(lone, members.row)]
                past = lone < members.group[-1] if len(members.row) else np.zeros(len(lone), bool)
                members, lone = add_lone(members, lone[past]), lone[~past]  # groups ascend
            columns.add(*members)
    columns.add(*add_lone(no_members(), lone))
    members = Members(*columns.arrays())
    return Result(search, members, threshold, grouping, keep, rank, folder, decisions=decisions)


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
            f"{search.threshold:.9g}, more than --keep_fraction {fraction:g}; search again at a "
            "lower --threshold"
        )
    while result.kept / search.rows < fraction:
        if result.threshold >= 1:
            raise SnipError(
                f"{result.kept / search.rows:.4%} of the rows are kept at threshold "
                f"{result.threshold:.9g}, and there is no higher one; expected at least "
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
            f"the search was made at threshold {search.threshold:.9g}, pairs below it are unknown; "
            f"expected {search.threshold:.9g} or more, found {threshold:.9g}: search again"
        )


def decide_groups(
    search: PairSearch,
    grouping: str,
    rank: Rank,
    decisions: Decisions | None,
    block: Block,
    threshold: float,
    done: Callable[[int], None],
    *,
    named: bool = True,
) -> Members:
    """Decide whole groups by a rule, and again where a person decided; see `decide_block`."""
    named = named or decisions is not None
    members = decide_block(search, block, threshold, grouping, rank, done, named=named)
    if decisions is None:
        return members

    def decide(block: Block, rank: Rank, kept: np.ndarray, dropped: np.ndarray) -> Members:
        given = kept, dropped
        return decide_block(search, block, threshold, grouping, rank, lambda edges: None, given)

    return decide_again(members, block, decisions, rank, decide)


def decide_block(
    search: PairSearch,
    block: Block,
    threshold: float,
    grouping: str,
    rank: Rank,
    done: Callable[[int], None],
    given: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    named: bool = True,
) -> Members:
    """Decide whole groups; exact copies are folded away before and unfolded after.

    ``done`` takes how many edges of their forest are decided; ``given`` are rows, (n,) int64 each,
    that are kept, and that are removed, whatever the rules say. Unless ``named``, star finds no
    representatives.
    """
    if search.best is not None:
        members = star.group_matches(block.forest, search.best, threshold)
        done(len(block.forest.a))
        return members
    copies = Copies(block.copies, block.originals, rank)
    forest = copies.fold(block.forest)
    nearest = None if block.nearest is None else copies.fold_nearest(block.nearest)
    kept, dropped = given or (np.empty(0, np.int64), np.empty(0, np.int64))
    if nearest is not None:
        free = ~np.isin(nearest.row, kept)
        nearest = Nearest(*(column[free] for column in nearest))
        dropped = np.union1d(dropped, nearest.row)
    if grouping == "components":
        members = star.group_components(forest, rank)
        done(len(forest.a))
        return copies.unfold(refer_components(members, nearest) if nearest else members)
    if block.pairs is not None:
        row, group = components(forest)
        members = star.star_from_pairs(row, group, rank(row), block.pairs)
        done(len(forest.a))
        return copies.unfold(members)
    if (features := search.inputs.features) is None:
        raise SnipError("star grouping compares raw rows: give the features, or use components")
    compare = star.Compare(features.gather, threshold, search.inputs.also, named)
    members = star.group_star(forest, rank, compare, dropped, done, kept)
    return copies.unfold(refer_star(members, nearest) if nearest else members)
