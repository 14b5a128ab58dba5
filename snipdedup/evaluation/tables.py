"""The tables of an evaluation: Markdown to keep, a few lines to read at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = {"raw": "raw features", "opq": "OPQ on raw", "pca": "PCA", "mse": "MSE", "snip": "SNIP"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, numbers to the right."""
    return [
        f"| {' | '.join(head)} |",
        "|---" + "|---:" * (len(head) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def recall_table(body: dict[str, Any], k: str, nprobe: int) -> list[str]:
    """Return recall@k by contender and code size, at one number of lists visited."""
    measured = body["neighbours"]
    sizes = list(dict.fromkeys(e["bytes"] for e in measured))
    rows = []
    for name in dict.fromkeys(e["contender"] for e in measured):
        at = {e["bytes"]: e["recall"][k] for e in measured if e["contender"] == name and
              e["nprobe"] in (None, nprobe)}  # fmt: skip
        rows.append([NAMES[name], *(f"{at[s]:.3f}" if s in at else "" for s in sizes)])
    return markdown([f"recall@{k}", *(f"{s} B" if s else "uncoded" for s in sizes)], rows)


def flag_table(body: dict[str, Any]) -> list[str]:
    """Return the recall of duplicate flags at each precision, by contender and rule."""
    flags = body["flags"]
    sizes = list(dict.fromkeys(e["bytes"] for e in flags))
    rows = []
    for name, rule in dict.fromkeys((e["contender"], e["rule"]) for e in flags):
        at = {e["bytes"]: e["at"] for e in flags if (e["contender"], e["rule"]) == (name, rule)}
        cells = [" / ".join(f"{point['recall']:.2f}" for point in at.get(s, [])) for s in sizes]
        rows.append([f"{NAMES[name]}, {rule}", *cells])
    wanted = " / ".join(f"{point['wanted']:.2f}" for point in flags[0]["at"])
    return markdown([f"recall at precision {wanted}", *(f"{s} B" for s in sizes)], rows)


def budget_table(body: dict[str, Any]) -> list[str]:
    """Return where recall@10 goes."""
    rows = [
        [f"{NAMES[e['contender']]}, {e['bytes']} B",
         *(f"{e[name]:.3f}" for name in ("encoder", "code", "probes", "recall"))]
        for e in body["budget"]
    ]  # fmt: skip
    return markdown(["lost by", "encoder", "code", "probes", "left"], rows)


def text_table(body: dict[str, Any]) -> list[str]:
    """Return how often texts and pictures find each other, with 95 % intervals."""

    def show(s: dict[str, float]) -> str:
        return f"{s['recall']:.3f} ({s['low']:.3f} – {s['high']:.3f})"

    rows = [
        [f"{NAMES[e['contender']]}, {e['direction']}", show(e["1"]), show(e["10"])]
        for e in body["text"]
    ]
    return markdown(["uncoded", "recall@1", "recall@10"], rows)


def shown_nprobe(body: dict[str, Any]) -> int:
    """Return the number of lists that tables are about."""
    return int(body["budget"][0]["nprobe"])


def eval_page(body: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    nprobe = shown_nprobe(body)
    lines = [
        "# Evaluation",
        "",
        f"{body['rows']:,} rows × {body['dim']}; {body['queries']:,} of them asked for their "
        f"neighbours among all, against exact cosine. {body['learned_rows']:,} others, and no copy "
        f"of a query, were learnt from. IVF{body['nlist']}, nprobe {nprobe}.",
        "",
    ]
    if body["settings"]["encoder"]:
        lines += ["The SNIP encoder was given: it may have learnt from queries.", ""]
    for k in body["neighbours"][0]["recall"]:
        lines += [*recall_table(body, k, nprobe), ""]
    lines += ["## Where recall@10 is lost", "", *budget_table(body), ""]
    lines += [
        "## Duplicate flags",
        "",
        f"A query is flagged if its best neighbour passes; {body['duplicates']:,} queries have a "
        f"row at or above cosine {body['settings']['threshold']:g}. nprobe "
        f"{body['settings']['flag_nprobe']}.",
        "",
        *flag_table(body),
        "",
    ]
    if "text" in body:
        among = body["text"][0]["among"]
        lines += ["## Text and images", "", f"Own partner among {among:,}; 95 % intervals.", ""]
        lines += [*text_table(body), ""]
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in body["seconds"].items())
    return "\n".join([*lines, f"Seconds: {seconds}.", ""])


def eval_summary(body: dict[str, Any]) -> str:
    """Return what the command prints."""
    lines = [
        f"{body['rows']:,} rows, {body['queries']:,} queries, IVF{body['nlist']}, nprobe "
        f"{shown_nprobe(body)}; {body['duplicates']:,} queries have a duplicate",
        "",
        *recall_table(body, "10", shown_nprobe(body)),
        "",
        *flag_table(body),
    ]
    if "text" in body:
        lines += ["", *text_table(body)]
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in body["seconds"].items())
    return "\n".join([*lines, "", f"seconds: {seconds}"])
