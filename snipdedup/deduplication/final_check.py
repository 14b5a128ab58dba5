"""The last check of what was decided: each removed row and what stands for it, on the raw rows.

The rules choose by cosines of their own, and by what the search handed over. The cosines that a
result names, and that OUT holds, are computed here and nowhere else, before anything is written. A
row that would go without a reason ends the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from snipdedup import progress
from snipdedup.deduplication.found import Found
from snipdedup.errors import InternalError
from snipdedup.features.cosine import pair_cosine, same_bits
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.blocks import slices
from snipdedup.groups.members import Members, Nearest
from snipdedup.groups.star import torch_threads
from snipdedup.join.verify import PRODUCT_PAIRS
from snipdedup.parallel import ordered_map, scratch
from snipdedup.storage.external_sort import Columns, among

GATHER_PAIRS = 1 << 13  # pairs whose rows are gathered together


class Decided(NamedTuple):
    """What members are held against.

    Attributes
    ----------
    found : Found
    features : Features or None
        The rows that were searched. Without them, or where pairs were never verified, there are no
        cosines, and row numbers alone are checked.
    threshold : numpy.float32
    chains : bool
        Whether a row may go for one that it does not match, as components let it.
    nearest : Nearest or None
        Of each distinct row that matches a reference row at this threshold.
    """

    found: Found
    features: Features | None
    threshold: np.float32
    chains: bool
    nearest: Nearest | None


def prove(
    found: Found,
    features: Features | None,
    members: Members,
    threshold: float,
    grouping: str,
    folder: Path | None,
) -> tuple[Members, np.ndarray | None]:
    """Fill in the cosines of members with what stands for them, some whole groups at a time.

    Parameters
    ----------
    found, features, members, threshold, grouping, folder
        As `result.Result` has them; what ``members`` hold as similarity is not looked at.

    Returns
    -------
    members : Members
        With ``similarity``: 1 for a row that stays, NaN where there are no cosines.
    near : (n,) float32, or None without references
        Cosine of each member with its nearest reference row; NaN where none matches.

    Raises
    ------
    InternalError
        If a row would go without a reason, or is none of the rows that were searched.
    """
    nearest = None if found.nearest is None else found.nearest.at(threshold)
    decided = Decided(
        found,
        features if found.verified else None,
        np.float32(threshold),
        grouping == "components" and found.best is None,
        nearest,
    )
    columns = Columns(folder and folder / "proved", {"similarity": "<f4", "near": "<f4"})
    with progress.bar(len(members.row), "proving", "rows") as bar:
        for part in slices(members):
            order = np.argsort(part.row, kind="stable")
            check_rows(decided, part, order)
            columns.add(*prove_part(decided, part, order))
            bar.update(len(part.row))
    similarity, near = columns.arrays()
    return members._replace(similarity=similarity), None if nearest is None else near


def check_rows(decided: Decided, members: Members, order: np.ndarray) -> None:
    """Refuse members that are no rows of the set, twice there, or go for a row that does not stay.

    By SemDeDup's rule rows may go for rows that go. ``order``, (n,) int64, are the places of the
    members by row.
    """
    found, rows = decided.found, decided.found.rows
    outside = 0 if found.references is None else found.references.rows
    row, named, gone = members.row, members.representative, members.is_dup

    def refuse(wrong: np.ndarray, why: str) -> None:
        if wrong.any():
            which = int(np.flatnonzero(wrong)[0])
            stop(decided, row[which], f"{why} {describe(decided, named[which])}")

    refuse((row < 0) | (row >= rows), f"is none of the {rows:,} rows, and goes for")
    refuse((named < -outside) | (named >= rows), f"of {rows:,} goes for one that is not there,")
    refuse(~gone & (named != row), "stays, and has another that stands for it,")
    refuse(among(found.bad, row), "cannot be compared, and is in a group with")
    again = np.zeros(len(row), bool)
    again[order[1:]] = row[order[1:]] == row[order[:-1]]
    refuse(again, "is twice among the rows of groups, once for")
    own = gone & (named >= 0)
    place = np.minimum(np.searchsorted(row, named, sorter=order), max(0, len(row) - 1))
    at = order[place] if len(row) else place
    apart = (row[at] != named) | (members.group[at] != members.group)
    refuse(own & apart, "goes for one of another group,")
    refuse(own & (named == row), "goes for itself,")
    if found.best is None:
        refuse(own & gone[at], "goes for a row that goes too,")


def prove_part(
    decided: Decided, members: Members, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarity and the cosine with the nearest reference row of whole groups."""
    similarity = np.where(members.is_dup, np.float32(np.nan), np.float32(1))
    near = np.full(len(members.row), np.nan, np.float32)
    if decided.features is None:
        return similarity, near
    gone = order[members.is_dup[order]]
    named = members.representative[gone]
    matched, reference = nearest_of(decided, members.row[order])
    close = order[matched]
    similarity[gone] = proved(decided, members.row[gone], named, decided.chains)
    twice = members.representative[close] == ~reference
    near[close[twice]] = similarity[close[twice]]
    rest = close[~twice]
    near[rest] = proved(decided, members.row[rest], ~reference[~twice], False)
    low = np.flatnonzero(~(near[close] >= decided.threshold))
    if len(low):
        which = low[0]
        refuse_low(decided, members.row[close[which]], ~reference[which], near[close[which]])
    return similarity, near


def nearest_of(decided: Decided, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of rows that match a reference row, and the nearest one of each."""
    nearest = decided.nearest
    if nearest is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first = decided.found.first_of(rows)
    at = np.flatnonzero(among(nearest.row, first))
    return at, nearest.reference[np.searchsorted(nearest.row, first[at])]


def proved(decided: Decided, row: np.ndarray, named: np.ndarray, chains: bool) -> np.ndarray:
    """Return the cosines of ascending rows with those that stand for them, (n,) float32.

    Parameters
    ----------
    named : (n,) int64
        A number r < 0 is the reference row ~r.
    chains : bool
        Whether a cosine may be below the threshold.
    """
    found, features = decided.found, decided.features
    cosine = np.full(len(row), np.nan, np.float32)
    if features is None:
        return cosine
    own, other = np.flatnonzero(named >= 0), np.flatnonzero(named < 0)
    cosine[own] = pair_cosines(features, row[own], features, named[own])
    if len(other) and found.references is not None:
        others = found.references.features
        cosine[other] = pair_cosines(features, row[other], others, ~named[other])
    if chains:
        low = np.isnan(cosine)
    elif found.best is not None:
        low = ~(cosine > decided.threshold)  # SemDeDup's rule
    else:
        low = ~(cosine >= decided.threshold)
    if low.any():
        which = int(np.flatnonzero(low)[0])
        refuse_low(decided, row[which], named[which], cosine[which])
    if found.also is not None and not chains:
        held = found.also.holds(row, named)
        if not held.all():
            which = int(np.flatnonzero(~held)[0])
            says = f"goes for {describe(decided, named[which])}, but their captions do not match"
            stop(decided, row[which], says)
    return cosine


def pair_cosines(x: Features, row: np.ndarray, y: Features, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of ``x``, ascending, with another of ``y``, (n,) float32."""
    dtype = np.result_type(x.dtype, y.dtype)

    def gather(source: Features, rows: np.ndarray, use: str) -> np.ndarray:
        held = scratch(use, (len(rows), source.dim), source.dtype)
        return source.gather_ascending(rows, held).astype(dtype, copy=False)

    def compare(span: tuple[int, int]) -> np.ndarray:
        left, right = row[slice(*span)], other[slice(*span)]
        if x is y:
            rows, place = np.unique(np.concatenate([left, right]), return_inverse=True)
            raw = gather(x, rows, "gathered")
            return copies_aside(raw, raw, place[: len(left)], place[len(left) :])
        (rows, i), (others, j) = (np.unique(side, return_inverse=True) for side in (left, right))
        return copies_aside(gather(x, rows, "gathered"), gather(y, others, "beside"), i, j)

    spans = plan_blocks(len(row), GATHER_PAIRS)
    return np.concatenate([np.empty(0, np.float32), *ordered_map(compare, spans, torch_threads())])


def copies_aside(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32: 1 at once for copies."""
    cosine = np.ones(len(i), np.float32)
    for start, stop in plan_blocks(len(i), PRODUCT_PAIRS):
        left, right = np.take(x, i[start:stop], axis=0), np.take(y, j[start:stop], axis=0)
        other = np.flatnonzero(~same_bits(left, right))
        if 0 < len(other) < len(left):
            left, right = left[other], right[other]
        if len(other):
            cosine[start + other] = pair_cosine(left, right)
    return cosine


def describe(decided: Decided, number: int) -> str:
    """Return a row or, below 0, a reference row, in words."""
    references = decided.found.references
    if number >= 0 or references is None or number < -references.rows:
        return f"row {number:,}"
    item, row = references.locate(np.array([~number]))
    return f"row {row[0]:,} of {references.items[item[0]].name}"


def refuse_low(decided: Decided, row: int, named: int, cosine: float) -> NoReturn:
    """Refuse a pair that is none."""
    says = f"goes for {describe(decided, named)}, but their cosine is {cosine:.7g}, for a threshold"
    stop(decided, row, f"{says} of {decided.threshold:.7g}")


def stop(decided: Decided, row: int, what: str) -> NoReturn:
    """End the run for a row that goes wrongly."""
    found, where = decided.found, ""
    if 0 <= row < found.rows:
        shard = int(np.searchsorted(found.offsets, row, side="right")) - 1
        where = f" ({found.names[shard]}, row {row - found.offsets[shard]:,})"
    raise InternalError(
        f"internal error: row {row:,}{where} {what}; nothing was written: please report this"
    )
