"""Write docs/benchmarks.md from docs/benchmarks/*.json; with --check, say whether it is up to date.

python scripts/make_benchmarks.py [--check]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE, SOURCES = DOCS / "benchmarks.md", DOCS / "benchmarks"

HEAD = """\
# Benchmarks

Generated from `docs/benchmarks/*.json` by `python scripts/make_benchmarks.py`; do not edit. Each
file is one run of `scripts/bench_join.py`, or of `scripts/bench_codes.py` where recall of codes is
measured, and holds every setting, all repeats, and the machine; `grouping.json` and
`components.json` (of `bench_grouping.py` and `bench_components.py`) are shown in
[scale](scale.md), `recall_300k.json` and `recall_400k.json` (of `bench_recall.py`) in
[Calibration](internals/calibration.md).

**Time.** Whole processes, imports included, run in turn on a warm page cache; the median of the
repeats. *Floor*: the best time of a loop that only reads the rows, converts them to float32 and
multiplies each by a d × 128 matrix; imports not included. Brute force (numpy, float32, each pair
of rows once) is timed on a sample of queries and extrapolated. faiss IVFPQ is timed up to the end
of its search: project to 128 dimensions (PCA), train, add, search with k = 16; proving the
neighbours that it returns comes after the clock, and only true pairs are counted for it. SemDeDup's
rule: spherical k-means with about 8,700 rows a cluster, a row goes if an earlier row of its cluster
matches it. semhash takes all rows as float32 in memory. Peaks of anonymous memory are summed over
processes: what forked workers share is counted for each.

**Quality.** *Components*: rows beyond one a component found, over those of brute force. *Pairs*:
share of the true pairs over distinct rows whose two rows are in one component; *by row*: the same,
each row counted once, whatever the number of its pairs. *Rows*: share of the rows with a true pair
that are in a group at all. *Overlap*: rows removed by both, over those that brute force removes
(star, keep first). *Precision*: share of the removed rows that have a true match. *Covered*: share
of the removed rows that have a match that stays. *Beside*: rows that stay although an earlier row
that stays matches them. Above the size where every pair can be looked at, a sample of the distinct
rows is compared with all, and what needs every pair is left out. SemDeDup and semhash name one
match of each row that goes, so their components, made of these pairs, are the least that they
found: judge them by overlap and by rows.
"""

CODE_NAMES = ("PCA", "PCA head", "MSE", "SNIP", "OPQ on raw")
COLUMNS = (
    ("components", "component_recall"),
    ("pairs", "pair_recall"),
    ("by row", "pair_recall_by_row"),
    ("rows", "row_recall"),
    ("overlap", "overlap"),
    ("precision", "precision"),
    ("covered", "covered"),
)


def page(sources: Path = SOURCES) -> str:
    """Return the whole document."""
    bodies = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(sources.glob("*.json"))
    ]
    codes = [body for body in bodies if body.get("kind") == "codes"]
    bodies = [body for body in bodies if body.get("kind") is None]
    parts = [HEAD]
    parts += [section(body) for body in bodies if compares(body)]
    parts += [code_section(body) for body in codes]
    alone = [body for body in bodies if not compares(body)]
    if alone:
        parts.append(growth(sorted(alone, key=lambda body: body["data"]["rows"])))
    return "\n".join(parts)


def compares(body: dict[str, Any]) -> bool:
    """Return whether a run holds more than ours and the floor."""
    return bool(body["results"].keys() - {"ours", "floor"})


def section(body: dict[str, Any]) -> str:
    """Return the section of one run."""
    return "\n".join([f"## {body['name']}", "", describe(body), "", *table(body), "", notes(body)])


def describe(body: dict[str, Any]) -> str:
    """Return what was run on what, as a paragraph."""
    data, settings, host = body["data"], body["settings"], body["machine"]
    return (
        f"{data['rows']:,} rows × {data['dim']}, {data['dtype']}; threshold "
        f"{settings['threshold']:g}; median of {settings['repeats']}. {host['processor']}, "
        f"{host['cores']} cores, {host['memory'] / 1e9:.0f} GB; load before the run "
        f"{host['load_before']:.1f}. {body['measured']}."
    )


def table(body: dict[str, Any]) -> list[str]:
    """Return the results as a Markdown table, by time."""
    names = [name for name, _ in COLUMNS]
    lines = [
        f"| | seconds | × floor | × ours | {' | '.join(names)} | beside | removed |",
        "|---" + "|---:" * (len(names) + 5) + "|",
    ]
    results = body["results"]
    for name in sorted(results, key=lambda name: results[name]["seconds"]):
        lines.append(row(name, results[name], results))
    return lines


def row(name: str, result: dict[str, Any], results: dict[str, Any]) -> str:
    """Return the line of one method."""
    quality = result.get("quality") or {}
    seconds = f"{result['seconds']:,.2f}" + (" *" if result.get("extrapolated") else "")
    shown = f"**{name}**" if name == "ours" else name
    cells = [shown, seconds]
    for other in ("floor", "ours"):
        ratio = result["seconds"] / results[other]["seconds"] if other in results else None
        cells.append("" if ratio is None else f"{ratio:,.2f}")
    cells += [ratio_cell(quality.get(key)) for _, key in COLUMNS]
    counts = (quality.get("beside"), quality.get("removed"))
    cells += ["" if count is None else f"{count:,}" for count in counts]
    return f"| {' | '.join(cells)} |"


def ratio_cell(value: float | None) -> str:
    """Lay out a share; what is not quite 1 never reads 1."""
    if value is None:
        return ""
    text = f"{value:.4f}"
    return f"{value:.6f}" if text == "1.0000" and value != 1 else text


def notes(body: dict[str, Any]) -> str:
    """Return what stands under the table."""
    lines = []
    if any(result.get("extrapolated") for result in body["results"].values()):
        lines.append("\\* extrapolated from a sample of queries.")
    truth, ours = body["truth"], body["results"]["ours"]
    if truth:
        kind = "every pair" if truth["full"] else f"a sample of {truth['judged']:,} distinct rows"
        lines.append(
            f"Truth: {kind}; {truth['pairs']:,} pairs, {truth['distinct']:,} of the rows distinct."
        )
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ours["stages"].items())
    lines.append(f"Ours by stage, seconds: {stages}; peak of anonymous memory {peak(ours)}.")
    lines.append(describe_ours(body))
    for name, reason in body["skipped"].items():
        lines.append(f"{name} was not run: {reason}.")
    command = f"python scripts/bench_join.py --features FOLDER {body['flags']} --out FILE.json"
    return "\n\n".join(lines) + f"\n\n```sh\n{command}\n```\n"


def describe_ours(body: dict[str, Any]) -> str:
    """Return what ours met: kernels, visits, candidates, proofs, and CPU time beside the floor's.

    Older files hold no CPU seconds and no proofs.
    """
    floor, ours = body["results"]["floor"], body["results"]["ours"]
    method, rows = ours["method"], body["data"]["rows"]
    text = (
        f"Ours: kernel {method['kernel']}, {method['visits'] / rows:.2f} visits a row, "
        f"{method['candidates']:,} candidates"
    )
    quality = ours.get("quality") or {}
    if quality.get("proved") is not None:
        text += (
            f"; {ratio_cell(quality['proved'])} of the {quality['removed']:,} removed rows proved "
            "by a pair of float64 cosine"
        )
    if "cpu_seconds" in ours:
        ratio = ours["cpu_seconds"] / floor["cpu_seconds"]
        text += (
            f". CPU seconds: ours {ours['cpu_seconds']:.2f}, a loop of the floor on one thread "
            f"{floor['cpu_seconds']:.2f} ({ratio:.1f} ×)"
        )
    return text + "."


def growth(bodies: list[dict[str, Any]]) -> str:
    """Return the section of the runs of ours alone."""
    lines = [
        "## Growth",
        "",
        "| | rows | seconds | µs a row | × floor | peak of anonymous memory | flags |",
        "|---" + "|---:" * 5 + "|---|",
    ]
    for body in bodies:
        ours, floor = body["results"]["ours"], body["results"].get("floor")
        rows = body["data"]["rows"]
        ratio = f"{ours['seconds'] / floor['seconds']:.2f}" if floor else ""
        lines.append(
            f"| {body['name']} | {rows:,} | {ours['seconds']:.2f} | "
            f"{1e6 * ours['seconds'] / rows:.2f} | {ratio} | {peak(ours)} | "
            f"`{body['settings']['ours_flags']}` |"
        )
    return "\n".join([*lines, "", describe(bodies[-1]), ""])


def code_section(body: dict[str, Any]) -> str:
    """Return the section of a run of bench_codes.py."""
    data, host, asked = body["data"], body["machine"], body["settings"]
    steps = f" --steps {asked['steps']}" if asked["steps"] else " --quick" * asked["quick"]
    lines = [
        f"## {body['name']}",
        "",
        f"{data['rows']:,} rows × {data['dim']}; recall@{asked['k']} of short descriptors, uncoded "
        f"and as codes, on rows that nothing was learnt from; IVF{asked['nlist']}, nprobe "
        f"{asked['nprobe']}; mean ± sd over seeds. {host['processor']}, {host['cores']} cores.",
        "",
        *code_table(body),
        "```sh",
        f"python scripts/bench_codes.py --features FOLDER{steps} --out FILE.json",
        "```",
        "",
    ]
    return "\n".join(lines)


def code_table(body: dict[str, Any]) -> list[str]:
    """Return mean ± standard deviation over seeds as Markdown, one table a split."""
    lines = []
    for split in dict.fromkeys(run["split"] for run in body["runs"]):
        runs = [run for run in body["runs"] if run["split"] == split]
        keys = list(dict.fromkeys(key for run in runs for key in run["recall"]))
        keys.sort(key=lambda key: (key != "uncoded", key.zfill(3)))
        seeds = len({run["seed"] for run in runs})
        head = " | ".join("uncoded" if key == "uncoded" else f"{key} B" for key in keys)
        lines += [
            f"| split: {split} ({seeds} seeds) | {head} |",
            "|---" + "|---:" * len(keys) + "|",
        ]
        for name in (n for n in CODE_NAMES if any(run["name"] == n for run in runs)):
            mine = [run["recall"] for run in runs if run["name"] == name]
            cells = [cell([recalls[key] for recalls in mine if key in recalls]) for key in keys]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def cell(values: list[float]) -> str:
    """Lay out a mean with its standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def peak(ours: dict[str, Any]) -> str:
    """Lay out the most anonymous memory of a run."""
    return f"{ours['peak_anonymous_bytes'] / 2**30:.2f} GiB"


def main() -> int:
    """Write the page, or compare it; return the exit status."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print(f"{PAGE} is out of date; run: python scripts/make_benchmarks.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
