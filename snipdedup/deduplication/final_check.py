"""The last check of a decision: each removed row and its representative, on the raw rows.

The rules choose by cosines of their own, and by what the search found. The cosines that a result
and OUT hold are computed here and nowhere else, before anything is written. A row that would be
removed without a reason ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from snipdedup import progress
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.errors import InternalError
from snipdedup.features.shards import Features
from snipdedup.groups.members import Members, slices
from snipdedup.groups.pairs import pair_cosines
from snipdedup.parallel import given_threads
from snipdedup.storage.external_sort import Columns, among


def fill_similarity(
    search: PairSearch,
    members: Members,
    threshold: float,
    grouping: str,
    folder: Path | None,
    dropped: np.ndarray,
) -> tuple[Members, np.ndarray | None, Sequence[np.ndarray]]:
    """Compute the cosines of members with their representatives, some whole groups at a time.

    The parameters are fields of `result.Result`; ``dropped`` rows, (n,) int64, ascending, are told
    to be removed and may have no representative but themselves. The similarity that ``members``
    hold is not used.

    Return the members, with a similarity of 1 for kept rows, NaN where pairs were never verified;
    and with references the cosine of each with its nearest reference row, NaN where none matches;
    and those of removed rows in each of the second features, NaN of kept rows.
    """
    check = FinalCheck(search, threshold, grouping, dropped)
    names = ["similarity", "near", *(f"also{n}" for n in range(len(search.inputs.seconds)))]
    columns = Columns(folder and folder / "checked", dict.fromkeys(names, "<f4"))
    with progress.bar(len(members.row), "proving", "rows") as bar:
        for part in slices(members):
            order = np.argsort(part.row, kind="stable")
            check.rows(part, order)
            columns.add(*check.cosines(part, order), *check.second_cosines(part, order))
            bar.update(len(part.row))
    similarity, near, *also = columns.arrays()
    members = members._replace(similarity=similarity)
    return members, None if check.nearest is None else near, also


class FinalCheck:
    """Checks members of whole groups; of pairs that were never verified, their row numbers alone.

    In ``every``, reference rows come before the rows of the set.
    """

    def __init__(
        self, search: PairSearch, threshold: float, grouping: str, dropped: np.ndarray
    ) -> None:
        self.search, self.threshold = search, np.float32(threshold)
        self.dropped = dropped
        self.may_chain = grouping == "components" and search.best is None
        self.nearest = None if search.nearest is None else search.nearest.at(threshold)
        self.every, references = search.inputs.features, search.inputs.references
        self.reference_rows = 0 if references is None else references.rows
        if references is not None and self.every is not None:
            self.every = references.before(self.every)

    def rows(self, members: Members, order: np.ndarray) -> None:
        """Refuse members that are no rows, are there twice, or have a wrong representative.

        By SemDeDup's rule a representative may be removed. ``order`` sorts the members by row.
        """
        rows, row, named = self.search.rows, members.row, members.representative
        alone = members.is_dup & (named == row) & among(self.dropped, row)
        wrong = (row < 0) | (row >= rows) | (among(self.search.bad, row) & ~alone)
        wrong[order[1:]] |= row[order[1:]] == row[order[:-1]]
        wrong |= (named < -self.reference_rows) | (named >= rows)
        wrong |= ~members.is_dup & (named != row)
        place = np.minimum(np.searchsorted(row, named, sorter=order), max(0, len(row) - 1))
        at = order[place] if len(row) else place
        unfit = (row[at] != named) | (members.group[at] != members.group) | (named == row)
        if self.search.best is None:
            unfit |= members.is_dup[at]
        wrong |= members.is_dup & (named >= 0) & unfit & ~alone
        for which in np.flatnonzero(wrong)[:1]:
            state = "removed for" if members.is_dup[which] else "kept, with the representative"
            self.stop(
                row[which],
                f"of {rows:,} has a wrong entry in group {members.group[which]:,}, where it is "
                f"{state} {self.describe(named[which])}",
            )

    def cosines(self, members: Members, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the similarity and the cosine with the nearest reference row of whole groups."""
        for_other = members.is_dup & (members.representative != members.row)
        similarity = np.where(for_other, np.float32(np.nan), np.float32(1))
        near = np.full(len(members.row), np.nan, np.float32)
        if self.every is None:
            return similarity, near
        removed = order[for_other[order]]
        row, named = members.row[removed], members.representative[removed]
        similarity[removed] = self.verified(self.every, row, named, self.may_chain)
        if self.nearest is None:
            return similarity, near
        original = self.search.original_of(members.row[order])
        matched = np.flatnonzero(among(self.nearest.row, original))
        place = np.searchsorted(self.nearest.row, original[matched])
        close, reference = order[matched], self.nearest.reference[place]
        known = members.representative[close] == ~reference
        near[close[known]] = similarity[close[known]]
        rest = close[~known]
        near[rest] = self.verified(self.every, members.row[rest], ~reference[~known], False)
        self.refuse_low(members.row[close], ~reference, near[close], near[close] >= self.threshold)
        return similarity, near

    def verified(
        self, every: Features, row: np.ndarray, named: np.ndarray, may_chain: bool
    ) -> np.ndarray:
        """Return the cosines of ascending rows with their representatives, (n,) float32.

        A representative r < 0 is the reference row ~r. With ``may_chain`` a cosine may be below
        the threshold.
        """
        other = np.where(named < 0, ~named, named + self.reference_rows)
        cosine = pair_cosines(every.gather, row + self.reference_rows, other, given_threads())
        if may_chain:
            enough = ~np.isnan(cosine)
        elif self.search.best is not None:  # SemDeDup's rule
            enough = cosine > self.threshold
        else:
            enough = cosine >= self.threshold
        self.refuse_low(row, named, cosine, enough)
        return cosine

    def second_cosines(self, members: Members, order: np.ndarray) -> list[np.ndarray]:
        """Return the cosines of removed rows of whole groups in each of the second features."""
        for_other = members.is_dup & (members.representative != members.row)
        removed, found = order[for_other[order]], []
        row, named = members.row[removed], members.representative[removed]
        for second in self.search.inputs.seconds:
            cosine = pair_cosines(second.features.gather, row, named, given_threads())
            enough = cosine >= np.float32(second.threshold)
            if self.may_chain:
                enough = ~np.isnan(cosine)
            self.refuse_low(row, named, cosine, enough, second.threshold, f" in {second.name}")
            found.append(np.full(len(members.row), np.nan, np.float32))
            found[-1][removed] = cosine
        return found

    def describe(self, number: int) -> str:
        """Return a row or, below 0, a reference row, in words."""
        references = self.search.inputs.references
        if number >= 0 or references is None or number < -references.rows:
            return f"row {number:,}"
        names, row = references.locate(np.array([~number]))
        return f"row {row[0]:,} of {names[0]}"

    def refuse_low(
        self,
        row: np.ndarray,
        named: np.ndarray,
        cosine: np.ndarray,
        enough: np.ndarray,
        threshold: float | None = None,
        where: str = "",
    ) -> None:
        """Refuse the first row whose cosine is not ``enough``, (n,) bool."""
        limit = self.threshold if threshold is None else threshold
        for at in np.flatnonzero(~enough)[:1]:
            self.stop(
                row[at],
                f"is removed for {self.describe(named[at])}, but their cosine{where} is "
                f"{cosine[at]:.7g}, for a threshold of {limit:.7g}",
            )

    def stop(self, row: int, what: str) -> NoReturn:
        """End the run for a row that is removed wrongly."""
        search, where = self.search, ""
        if 0 <= row < search.rows:
            shard = int(np.searchsorted(search.offsets, row, side="right")) - 1
            where = f" ({search.names[shard]}, row {row - search.offsets[shard]:,})"
        raise InternalError(
            f"internal error: row {row:,}{where} {what}; nothing was written: please report this"
        )
