"""The summary that a run ends with, from what its manifest holds."""

from __future__ import annotations

from typing import Any


def summarize(entries: dict[str, Any]) -> str:
    """Return the lines that a run ends with, from its manifest or `Result.entries`."""
    counts, settings, method = entries["counts"], entries["settings"], entries["method"]
    rows, removed = counts["rows"], counts["removed"]
    how = f"threshold {settings['threshold']:.9g}, grouping {settings['grouping']}"
    if entries.get("epsilons"):
        epsilon = 1 - settings["threshold"]
        how = f"SemDeDup with {method['clusters']:,} clusters, epsilon {epsilon:g}"

    def line(name: str, count: int, note: str = "") -> str:
        return f"  {name:<12}{count:>12,}  {note}".rstrip()

    lines = [
        f"{rows:,} rows, {how}, keep {settings['keep']}",
        line("removed", removed, f"({100 * (removed / rows):.2f} %)"),
        line("kept", counts["kept"]),
        line("groups", counts["groups"], f"(the largest: {counts['largest_group']:,} rows)"),
        line("exact copies", counts["exact_copies"]),
    ]
    if "reference_rows" in counts:
        note = f"removed for one of {counts['reference_rows']:,} reference rows"
        lines.append(line("references", counts["removed_for_reference"], note))
    if settings.get("references_only"):
        lines.append("  note: rows were compared with the references only, not with one another")
    if "model" in method:
        kept = "by the model that its run kept"
        new = "by a new model; --keep_work in the run it refers to would save that time"
        how = kept if method["model"] == "kept" else new
        lines.append(f"  note: the reference rows were encoded again, {how}")
    source = entries.get("threshold_from", "given")
    if source == "default":
        lines.append("  note: no --threshold was given: .95 is CLIP's; see docs/threshold.md")
    elif source not in ("given", "keep_fraction"):
        lines.append(f"  note: no --threshold was given: this one is usual for {source}")
    for column, caught in entries.get("baselines", {}).items():
        lines.append(f"  equal {column}s alone would catch {caught:,} of the removed rows")
    if "told_to_go" in counts:
        note = f"told to stay, {counts['told_to_go']:,} to go (--decisions)"
        lines.append(line("decisions", counts["told_to_stay"], note))
    if counts["bad_rows"]:
        lines.append(line("bad rows", counts["bad_rows"], "(kept; see bad_rows.parquet)"))
    if counts["chained"]:
        note = "removed rows are below the threshold to their representative; --grouping star "
        lines.append(line("chained", counts["chained"], note + "avoids that"))
    if not entries["verified"]:
        lines.append("  unverified: no features were given, so no pair was verified")
    lines += table_lines(entries)
    if "seconds" in entries:
        spent = [f"{stage} {seconds:.1f}" for stage, seconds in entries["seconds"].items()]
        lines.append(f"seconds: {', '.join(spent)}")
    return "\n".join(lines)


def table_lines(entries: dict[str, Any]) -> list[str]:
    """Lay out what other thresholds or epsilons remove, and what borders of clusters cost."""
    lines, rows, method = [""], entries["counts"]["rows"], entries["method"]
    lines += level_lines(entries["thresholds"], entries["settings"])
    if entries.get("epsilons"):
        lines.append("     epsilon   removed rows")
    for level in entries.get("epsilons", []):
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
    return [*lines, ""] if len(lines) > 1 else []


def level_lines(levels: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Lay out what the run's grouping removes at each threshold, and what components would."""
    if not levels:
        return []
    star = "components" in levels[0]  # of components themselves, and of older runs, they are not
    title = f"  {settings['grouping'] if star else 'components'} at threshold"
    lines = [f"{title:<25}   removed rows        groups  largest group"]
    lines[0] += "   removed by components" * star
    for level in levels:
        count = f"{'~' * level.get('estimated', False)}{level['removed']:,}"
        more = f"   {level['components']:>21,}" if star else ""
        lines.append(
            f"  {level['threshold']:>23.3f}   {count:>12}  {level['groups']:>12,}  "
            f"{level['largest']:>13,}{more}"
        )
    if any(level.get("estimated") for level in levels):
        lines.append("  ~ estimated from some of the groups, as they are large; to count them, run")
        lines.append("    snip dedup OUT --threshold T --out OUT2")
    lowest = f"{levels[0]['threshold']:.9g}"
    return [
        *lines,
        f"  below {lowest}: search again, by snip dedup FEATURES --threshold T --out OUT2",
    ]
