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

`python scripts/make_benchmarks.py` writes this page from `docs/benchmarks/*.json`; do not edit it.
Each JSON file is one run of a script, with every setting, all repeats, and the machine. The
scripts are `scripts/bench_join.py` and, for codes, `scripts/bench_codes.py`. Other pages show the
other files: [Large sets](scale.md), [Calibration](internals/calibration.md), [Models of
pictures](howto/models.md).

## How time is measured

Each tool is a process of its own. The time of the whole process counts, with its imports. The
tools run one after another, on files that are in the memory of the system already. The tables show
the median of the repeats.

- *ours* is `snip dedup`.
- *floor* is a loop that reads all rows, converts them to float32, and multiplies each by a d × 128
  matrix. Its best time counts, without imports.
- *brute* compares each pair of rows once, with numpy in float32. A sample of the rows is compared
  with all, and the time of all is extrapolated from it.
- *faiss-pq16-nprobe4* is an IVFPQ index of faiss with codes of 16 bytes; a search visits 4 lists.
  It projects the rows to 128 dimensions (PCA), trains, adds all rows, and searches the 16 nearest
  of each. The check of the neighbours on the raw features is not in its time, and only true pairs
  count as found.
- *semdedup* is the rule of SemDeDup: k-means with about 8,700 rows a cluster; a row is removed if
  it matches an earlier row of its cluster.
- *semhash* gets all rows as float32, in memory.

Peaks of anonymous memory are added up over all processes. Memory that processes share is counted
for each of them.

## How quality is measured

A *match* is a pair of rows whose cosine, computed in float64, reaches the threshold. *Brute force*
finds them all, and removes rows by `--grouping star --keep first`. *Distinct rows* are all rows
without exact copies. *Components* are the groups that the pairs of a tool make.

| column | meaning |
|---|---|
| `components` | number of rows beyond one in each component, divided by that of brute force |
| `pairs` | share of the matching pairs of distinct rows that are in one component |
| `by row` | the same share for each row that has matches, averaged over these rows |
| `rows` | share of the rows with a match that are in a component with another row |
| `overlap` | share of the rows removed by brute force that the tool removes, too |
| `precision` | share of the removed rows that have a match |
| `covered` | share of the removed rows that match a kept row |
| `left` | number of kept rows that match an earlier kept row |

In sets of more than 120,000 rows, only a sample of the distinct rows is compared with all. Columns
that need every pair are then empty. SemDeDup and semhash report only one match of each removed
row. Their components are made from these pairs, so they look worse than they are: judge these
tools by `overlap` and `left`.

Under each table are the stages of *ours* and some numbers of its search. A *visit* is a list whose
rows a row is compared with. *Candidates* are the pairs that short codes could not rule out ([how
the join works](internals/join.md)).
"""

CODE_WORDS = """\
Two thirds of the rows train the encoders. The others are indexed, and queried. `split: random`:
the thirds are chosen at random, row by row. `split: shard`: by shards, so training and test rows
come from different videos or sites.

- *PCA*: principal components. *PCA head*: half as many of them.
- *MSE*, *SNIP*: an encoder trained with squared error, or with the SNIP loss.
- *OPQ on raw*: codes of the raw features, after a rotation that is trained for them (faiss).
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
        f"| | seconds | × floor | × ours | {' | '.join(names)} | left | removed |",
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
        kind = "all" if truth["full"] else f"a sample of {truth['judged']:,}"
        lines.append(
            f"Brute force compared {kind} of the {truth['distinct']:,} distinct rows with all, and "
            f"found {truth['pairs']:,} pairs."
        )
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ours["stages"].items())
    lines.append(f"Ours by stage, in seconds: {stages}. Peak of anonymous memory: {peak(ours)}.")
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
            f". Share of the {quality['removed']:,} removed rows that have a match among its "
            f"pairs: {ratio_cell(quality['proved'])}"
        )
    if "cpu_seconds" in ours:
        ratio = ours["cpu_seconds"] / floor["cpu_seconds"]
        text += (
            f". CPU seconds: ours {ours['cpu_seconds']:.2f}; one loop of the floor, on one thread, "
            f"{floor['cpu_seconds']:.2f}; ratio {ratio:.1f}"
        )
    return text + "."


def growth(bodies: list[dict[str, Any]]) -> str:
    """Return the section of the runs of ours alone."""
    lines = [
        "## Growth",
        "",
        "The same kind of synthetic set in several sizes, with `snip dedup` alone.",
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
        f"{data['rows']:,} rows × {data['dim']}; IVF{asked['nlist']}, nprobe {asked['nprobe']}. "
        f"{host['processor']}, {host['cores']} cores. The numbers are recall@{asked['k']}, as mean "
        "± standard deviation over seeds: the share of the true nearest neighbours that are found. "
        "*Uncoded*: by short descriptors. *4 B* and more: by codes of so many bytes.",
        "",
        CODE_WORDS,
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
