"""The few lines that a run of dedup ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snipdedup.deduplication.result import Result


def summary(result: Result, out: Path, body: dict[str, Any]) -> str:
    """Return the few lines that a run ends with."""
    counts = body["counts"]
    lines = [
        f"{result.rows:,} rows, {how_decided(result)}, keep {result.keep}",
        f"  removed     {counts['removed']:>12,}  ({100 * result.duplicate_ratio:.2f} %)",
        f"  stay        {counts['kept']:>12,}",
        f"  groups      {counts['groups']:>12,}  (the largest: {counts['largest_group']:,} rows)",
        f"  exact copies{counts['exact_copies']:>12,}",
    ]
    if "reference_rows" in counts:
        lines.append(
            f"  for others  {counts['removed_for_reference']:>12,}  go for one of "
            f"{counts['reference_rows']:,} reference rows"
        )
    if body["settings"].get("references_only"):
        lines.append("  note: rows were compared with the references only, not with one another")
    if "model" in body["method"]:
        kept = body["method"]["model"] == "kept"
        how = (
            "by the model that its run kept"
            if kept
            else "by a new model; --keep_work in the run it refers to would save that time"
        )
        lines.append(f"  note: the reference rows were encoded again, {how}")
    for column, caught in body["baselines"].items():
        lines.append(f"  equal {column}s alone would catch {caught:,} of the removed rows")
    if counts["bad_rows"]:
        lines.append(f"  bad rows    {counts['bad_rows']:>12,}  (stay; see bad_rows.parquet)")
    if result.chained:
        lines.append(
            f"  chained     {result.chained:>12,}  removed rows are below the threshold to the row "
            "that stays; --grouping star avoids that"
        )
    if not result.found.verified:
        lines.append("  unverified: no features were given, so no pair was proved")
    lines += threshold_table(body["thresholds"])
    if body["epsilons"]:
        lines += epsilon_lines(body["epsilons"], result.rows, body["method"])
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in body["seconds"].items())
    return "\n".join([*lines, f"seconds: {spent}", f"written to {out}"])


def how_decided(result: Result) -> str:
    """Say by which rule rows go."""
    if result.found.best is None:
        return f"threshold {result.threshold:g}, grouping {result.grouping}"
    clusters = len(result.found.best.centroids)
    return f"SemDeDup with {clusters:,} clusters, epsilon {1 - result.threshold:g}"


def epsilon_lines(table: list[dict[str, Any]], rows: int, notes: dict[str, Any]) -> list[str]:
    """Lay out what each epsilon removes, and what borders of clusters cost the first."""
    lines = ["", "     epsilon   rows that go"]
    for level in table:
        share = 100 * level["removed"] / rows
        lines.append(f"  {level['epsilon']:>10g}   {level['removed']:>12,}  ({share:.2f} %)")
    if "borders" in notes:
        cost = notes["borders"]
        share = 100 * cost["across"] / max(1, cost["pairs"])
        lines += [
            "",
            f"  borders: {cost['across']:,} of {cost['pairs']:,} pairs ({share:.2f} %) lie in two "
            "clusters, so they are not compared;",
            f"  {cost['beside']:,} rows stay beside a match that join finds (join with star: "
            f"{cost['star']:,} rows go, {cost['both']:,} of them here too)",
        ]
    return [*lines, ""]


def threshold_table(table: list[dict[str, Any]]) -> list[str]:
    """Lay out what other thresholds would remove."""
    if not table:
        return []
    lines = ["", "  components at threshold   rows that go        groups  largest group"]
    for level in table:
        lines.append(
            f"  {level['threshold']:>23.3f}   {level['removed']:>12,}  {level['groups']:>12,}  "
            f"{level['largest']:>13,}"
        )
    return [*lines, ""]
