"""What a search found and what was decided: counts, tables, other thresholds.

Nothing is computed twice: ratios and tables derive from the forest, the copies and the members.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from snipdedup.chain.references import References
from snipdedup.errors import SnipError
from snipdedup.ground import progress
from snipdedup.ground.cosine import pair_cosine
from snipdedup.ground.shards import Features
from snipdedup.grouping.groups import (
    Also,
    Best,
    Compare,
    Copies,
    Members,
    Nearest,
    Rank,
    group_components,
    group_matches,
    group_star,
    refer_components,
    refer_star,
    star_from_pairs,
)
from snipdedup.grouping.keep import rank_by
from snipdedup.search.forest import Edges, components, join_edges, make_edges
from snipdedup.settings import Dedup

GATHER_PAIRS = 16_384  # pairs whose rows are laid side by side at a time
STEP = 0.001  # between thresholds that --keep_fraction tries


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
    crcs : list of int
        CRC32 of each shard; empty where no features were read.
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
    text_crcs, reference_crcs : list of int
        CRC32 of each shard of these, where this run read them.
    """

    names: list[str]
    offsets: np.ndarray
    threshold: float
    forest: Edges
    copies: np.ndarray
    firsts: np.ndarray
    bad: np.ndarray
    crcs: list[int] = field(default_factory=list)
    pairs: Edges | None = None
    flags: np.ndarray | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    also: Also | None = None
    best: Best | None = None
    references: References | None = None
    nearest: Nearest | None = None
    text_crcs: list[int] = field(default_factory=list)
    reference_crcs: list[int] = field(default_factory=list)

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

    def first_of(self, rows: np.ndarray) -> np.ndarray:
        """Return for each row the first that equals it bit for bit, often the row itself."""
        if not len(self.copies):
            return rows
        place = np.minimum(np.searchsorted(self.copies, rows), len(self.copies) - 1)
        return np.where(self.copies[place] == rows, self.firsts[place], rows)

    @cached_property
    def whole_forest(self) -> Edges:
        """The forest with exact copies, ordered by (a, b)."""
        if self.best is not None:
            forest = self.best.edges(self.threshold)
            return forest.where(np.lexsort((forest.b, forest.a)))
        ones = np.ones(len(self.copies), np.float32)
        forest = join_edges([self.forest, make_edges(self.firsts, self.copies, ones)])
        return forest.where(np.lexsort((forest.b, forest.a)))


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
    """

    found: Found
    features: Features | None
    members: Members
    threshold: float
    grouping: str
    keep: str
    seed: int
    rank: Rank

    @cached_property
    def is_dup(self) -> np.ndarray:
        """True for each row to remove, (rows,) bool."""
        mask = np.zeros(self.found.rows, bool)
        mask[self.members.row[self.members.is_dup]] = True
        return mask

    @property
    def rows(self) -> int:
        """Number of rows of the input."""
        return self.found.rows

    @property
    def removed(self) -> int:
        """Number of rows to remove."""
        return int(self.members.is_dup.sum())

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
        return forest_table(self.found)

    @property
    def groups(self) -> Any:
        """The members as a ``pyarrow.Table``, see ``docs/formats.md``."""
        return groups_table(self, None)

    @property
    def chained(self) -> int:
        """Removed rows whose cosine with their representative is below the threshold."""
        below = self.members.similarity < np.float32(self.threshold)
        return int((below & self.members.is_dup).sum())

    def dup_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that represent others, ascending, and how many each."""
        named = self.members.representative[self.members.is_dup]
        return np.unique(named[named >= 0], return_counts=True)  # below 0: reference rows

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
) -> Result:
    """Group what was found and choose which rows stay.

    ``rank`` is the keep order; needed where ``keep`` names columns of the metadata.

    Raises
    ------
    SnipError
        If the threshold is below the one searched for, or pairs are unverified and another
        threshold is asked for.
    """
    check_threshold(found, threshold)
    rank = rank or rank_by("first" if found.best else keep, seed, None)
    if found.best is not None:
        members = group_matches(found.best, threshold)
    elif found.pairs is not None:
        members = decide_unverified(found, threshold, grouping, rank)
    else:
        members = decide_verified(found, features, threshold, grouping, rank)
    if features is not None and found.pairs is None:
        members = with_similarity(members, features, found.references)
    return Result(found, features, members, threshold, grouping, keep, seed, rank)


def decide_fraction(found: Found, fraction: float, decide_at: Callable[[float], Result]) -> Result:
    """Decide at the lowest threshold, in steps of .001, at which a share of the rows stays.

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
        threshold = round(result.threshold + STEP, 6)
        if threshold > 1:
            raise SnipError(
                f"{result.kept / rows:.4%} of the rows stay at threshold {result.threshold:g}, and "
                f"there is no higher one; expected at least --keep_fraction {fraction:g}"
            )
        result = decide_at(threshold)
    return result


def check_threshold(found: Found, threshold: float) -> None:
    """Refuse a threshold below the one that was searched for; SemDeDup's rule knows all."""
    if found.best is None and np.float32(threshold) < np.float32(found.threshold):
        raise SnipError(
            f"the search was made at threshold {found.threshold:g}, pairs below it are unknown; "
            f"expected {found.threshold:g} or more, found {threshold:g}: search again"
        )


def decide_verified(
    found: Found, features: Features | None, threshold: float, grouping: str, rank: Rank
) -> Members:
    """Group pairs that were proved; exact copies are folded away before and back after."""
    copies = Copies(found.copies, found.firsts, rank)
    forest, nearest = copies.fold(found.forest.at(threshold)), None
    if found.nearest is not None:
        nearest = copies.fold_nearest(found.nearest.at(threshold))
    if grouping == "components":
        members = group_components(forest, rank)
        return copies.unfold(refer_components(members, nearest) if nearest else members)
    if features is None:
        raise SnipError("star grouping compares raw rows: give the features, or use components")
    compare = Compare(features.gather, threshold, found.also)
    gone = nearest.row if nearest else None
    with progress.bar(len(components(forest)[0]), "grouping", "rows") as bar:
        members = group_star(forest, rank, compare, bar.update, gone)
    return copies.unfold(refer_star(members, nearest) if nearest else members)


def decide_unverified(found: Found, threshold: float, grouping: str, rank: Rank) -> Members:
    """Group pairs that could not be verified."""
    if threshold != found.threshold:
        raise SnipError("unverified pairs have no cosines; search with FEATURES to re-threshold")
    copies = Copies(found.copies, found.firsts, rank)
    if found.pairs is None or grouping == "components":
        return copies.unfold(group_components(found.forest, rank))
    row, group = components(found.forest)
    return copies.unfold(star_from_pairs(row, group, rank(row), found.pairs))


def with_similarity(members: Members, features: Features, references: References | None) -> Members:
    """Fill in cosines that are not known yet, in row order."""
    open_ = np.flatnonzero(np.isnan(members.similarity))
    open_ = open_[np.argsort(members.row[open_], kind="stable")]
    similarity = members.similarity.copy()
    for start in range(0, len(open_), GATHER_PAIRS):
        at = open_[start : start + GATHER_PAIRS]
        named = members.representative[at]
        other = named < 0
        for part, source, rows_of in (
            (at[~other], features, named[~other]),
            (at[other], references.features if references else features, ~named[other]),
        ):
            x, y = features.gather(members.row[part]), source.gather(rows_of)
            dtype = np.result_type(x.dtype, y.dtype)
            similarity[part] = pair_cosine(x.astype(dtype), y.astype(dtype))
    return members._replace(similarity=similarity)


def forest_table(found: Found) -> Any:
    """Return the forest as a ``pyarrow.Table``; unverified pairs have no similarity."""
    import pyarrow as pa

    forest = found.whole_forest
    unknown = np.full(len(forest.a), not found.verified)
    similarity = pa.array(forest.similarity, mask=unknown)
    return pa.table({"a": forest.a, "b": forest.b, "similarity": similarity})


def groups_table(result: Result, keys: Any) -> Any:
    """Return the members with their places and keys as a ``pyarrow.Table``.

    Parameters
    ----------
    result : Result
    keys : pyarrow.Array of string, or None
        Key of each member.
    """
    import pyarrow as pa

    members, offsets = result.members, result.found.offsets
    shard = np.searchsorted(offsets, members.row, side="right") - 1
    names = pa.array(result.found.names, pa.string())
    unknown = np.isnan(members.similarity)
    columns = {
        "row": members.row,
        "shard": names.take(pa.array(shard)),
        "shard_row": members.row - offsets[shard],
        "key": pa.nulls(len(members.row), pa.string()) if keys is None else keys,
        "group": members.group,
        "representative": members.representative,
        "similarity": pa.array(members.similarity, mask=unknown),
        "is_dup": members.is_dup,
    }
    return pa.table(columns | reference_columns(result))


def reference_columns(result: Result) -> dict[str, Any]:
    """Return what ``--reference`` adds to the members, and the representatives as rows there.

    ``reference`` names the input that the representative is a row of, null for FEATURES;
    ``reference_similarity`` is the cosine with the nearest reference row, null where none matches.
    """
    import pyarrow as pa

    found, members = result.found, result.members
    if found.references is None or found.nearest is None:
        return {}
    outside = np.flatnonzero(members.representative < 0)
    item, row = found.references.locate(~members.representative[outside])
    representative, name = members.representative.copy(), np.full(len(members.row), -1)
    representative[outside], name[outside] = row, item
    names = pa.array([item.name for item in found.references.items], pa.string())
    first = found.first_of(members.row)
    near = found.nearest.at(result.threshold)
    similarity = np.full(len(members.row), np.nan, np.float32)
    matched = np.flatnonzero(np.isin(first, near.row))
    similarity[matched] = near.similarity[np.searchsorted(near.row, first[matched])]
    return {
        "representative": representative,
        "reference": names.take(pa.array(name, mask=name < 0)),
        "reference_similarity": pa.array(similarity, mask=np.isnan(similarity)),
    }


def references_table(found: Found) -> Any:
    """Return each distinct row's nearest reference row, where one matches."""
    import pyarrow as pa

    if found.references is None or found.nearest is None:
        raise SnipError("there are no references to tabulate")
    item, row = found.references.locate(found.nearest.reference)
    names = pa.array([item.name for item in found.references.items], pa.string())
    return pa.table(
        {
            "row": found.nearest.row,
            "reference": names.take(pa.array(item)),
            "reference_row": row,
            "similarity": found.nearest.similarity,
        }
    )


@dataclass(frozen=True)
class Level:
    """One line of the threshold table: what components would remove."""

    threshold: float
    removed: int
    groups: int
    largest: int


def levels(found: Found, thresholds: list[float]) -> list[Level]:
    """Return, for each threshold, what the components of the forest amount to."""
    lines = []
    for threshold in thresholds:
        edges = found.whole_forest.at(threshold)
        _, sizes = np.unique(components(edges)[1], return_counts=True)
        lines.append(Level(threshold, len(edges.a), len(sizes), int(sizes.max(initial=1))))
    return lines


def as_json(lines: list[Level]) -> list[dict[str, Any]]:
    """Return a threshold table as JSON values."""
    return [dataclasses.asdict(line) for line in lines]
