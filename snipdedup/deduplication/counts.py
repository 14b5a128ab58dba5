"""The numbers of a result: counts, the table of thresholds, and the summary that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.groups.blocks import slices
from snipdedup.groups.members import Members, group_starts
from snipdedup.join.forest import Edges, number_ends
from snipdedup.native.fallback import link_smaller


class Counts(NamedTuple):
    """Numbers of rows and groups.

    Attributes
    ----------
    removed, chained : int
        Removed rows; of these, those below the threshold to their representative.
    for_reference : int
        Rows removed for a reference row.
    sizes : mapping of int to int
        How many groups have each size.
    represented : mapping of int to int
        How many kept rows represent each number of others.
    """

    removed: int
    chained: int
    for_reference: int
    sizes: Mapping[int, int]
    represented: Mapping[int, int]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Rows of the largest group; 1 without any."""
        return max(self.sizes, default=1)


def count_members(members: Members, threshold: float) -> Counts:
    """Count members; a representative that is a row of the set lies in its group."""
    removed = chained = for_reference = 0
    sizes: Counter[int] = Counter()
    represented: Counter[int] = Counter()
    for part in slices(members):
        named = part.representative[part.is_dup]
        removed += len(named)
        chained += int((part.similarity[part.is_dup] < np.float32(threshold)).sum())
        for_reference += int((named < 0).sum())
        sizes.update(np.diff(group_starts(part.group)).tolist())
        row, count = np.unique(named[named >= 0], return_counts=True)
        represented.update(count[~np.isin(row, part.row[part.is_dup])].tolist())
    return Counts(removed, chained, for_reference, sizes, represented)


@dataclass(frozen=True)
class Level:
    """One line of the threshold table: what components would remove."""

    threshold: float
    removed: int
    groups: int
    largest: int


def levels(search: PairSearch, thresholds: list[float], folder: Path | None = None) -> list[Level]:
    """Return, for each threshold, what components of the forest would remove."""
    lines = [Level(threshold, 0, 0, 1) for threshold in thresholds]
    if not lines:
        return lines
    for block in search.blocks(search.threshold, folder):
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


def summarize(entries: dict[str, Any]) -> str:
    """Return the lines that a run ends with, from its manifest or `Result.entries`."""
    counts, settings, method = entries["counts"], entries["settings"], entries["method"]
    rows, removed = counts["rows"], counts["removed"]
    how = f"threshold {settings['threshold']:g}, grouping {settings['grouping']}"
    if entries.get("epsilons"):
        epsilon = 1 - settings["threshold"]
        how = f"SemDeDup with {method['clusters']:,} clusters, epsilon {epsilon:g}"
    lines = [
        f"{rows:,} rows, {how}, keep {settings['keep']}",
        f"  removed     {removed:>12,}  ({100 * (removed / rows):.2f} %)",
        f"  kept        {counts['kept']:>12,}",
        f"  groups      {counts['groups']:>12,}  (the largest: {counts['largest_group']:,} rows)",
        f"  exact copies{counts['exact_copies']:>12,}",
    ]
    if "reference_rows" in counts:
        lines.append(
            f"  references  {counts['removed_for_reference']:>12,}  removed for one of "
            f"{counts['reference_rows']:,} reference rows"
        )
    if settings.get("references_only"):
        lines.append("  note: rows were compared with the references only, not with one another")
    if "model" in method:
        how = (
            "by the model that its run kept"
            if method["model"] == "kept"
            else "by a new model; --keep_work in the run it refers to would save that time"
        )
        lines.append(f"  note: the reference rows were encoded again, {how}")
    for column, caught in entries.get("baselines", {}).items():
        lines.append(f"  equal {column}s alone would catch {caught:,} of the removed rows")
    if counts["bad_rows"]:
        lines.append(f"  bad rows    {counts['bad_rows']:>12,}  (kept; see bad_rows.parquet)")
    if counts["chained"]:
        lines.append(
            f"  chained     {counts['chained']:>12,}  removed rows are below the threshold to "
            "their representative; --grouping star avoids that"
        )
    if not entries["verified"]:
        lines.append("  unverified: no features were given, so no pair was verified")
    lines += table_lines(entries["thresholds"])
    lines += epsilon_lines(entries.get("epsilons", []), rows, method)
    if "seconds" in entries:
        spent = [f"{stage} {seconds:.1f}" for stage, seconds in entries["seconds"].items()]
        lines.append(f"seconds: {', '.join(spent)}")
    return "\n".join(lines)


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """Lay out the table of thresholds."""
    if not table:
        return []
    lines = ["", "  components at threshold   removed rows        groups  largest group"]
    for level in table:
        lines.append(
            f"  {level['threshold']:>23.3f}   {level['removed']:>12,}  {level['groups']:>12,}  "
            f"{level['largest']:>13,}"
        )
    return [*lines, ""]


def epsilon_lines(table: list[dict[str, Any]], rows: int, method: dict[str, Any]) -> list[str]:
    """Lay out what each epsilon removes, and what borders of clusters cost the first."""
    if not table:
        return []
    lines = ["", "     epsilon   removed rows"]
    for level in table:
        share = 100 * level["removed"] / rows
        lines.append(f"  {level['epsilon']:>10g}   {level['removed']:>12,}  ({share:.2f} %)")
    if "borders" in method:
        cost = method["borders"]
        share = 100 * cost["across"] / max(1, cost["pairs"])
        lines += [
            "",
            f"  borders: {cost['across']:,} of {cost['pairs']:,} pairs ({share:.2f} %) lie in two "
            "clusters, so they are not compared;",
            f"  {cost['beside']:,} rows are kept beside a match that join finds (join with star "
            f"removes {cost['star']:,} rows, {cost['both']:,} of them are removed here too)",
        ]
    return [*lines, ""]
