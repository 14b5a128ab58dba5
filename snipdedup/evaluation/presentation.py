"""An evaluation to read: Markdown tables, a few lines, a picture by matplotlib (extra: plot)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NAMES = {"raw": "raw features", "opq": "OPQ on raw", "pca": "PCA", "mse": "MSE", "snip": "SNIP"}
LINES: dict[str, dict[str, Any]] = {  # of contenders
    "raw": {"marker": "s", "color": "0.45"},
    "opq": {"marker": "D", "color": "#c58b00"},
    "pca": {"marker": "o", "color": "#3b78b5"},
    "mse": {"marker": "^", "color": "#7a4fa3"},
    "snip": {"marker": "o", "color": "#c2272d", "lw": 2.4},
}
SHADES = ("#e8a33d", "#c2272d", "#5b1a4b", "#3b78b5")  # of flags, by code size
STYLES = {"difference": "-", "ratio": "--", "global": ":"}  # of flags, by rule
STAGES = {"recall": "#4d8f52", "probes": "#b9d3ea", "code": "#6fa3d0", "encoder": "#1f4e79"}
SIZE, DPI = (11, 8), 110
GAP = 0.7  # between the bars of two contenders


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table, numbers to the right, and an empty line."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return [table[0], table[1].replace(" ", ""), *table[2:], ""]


def table_by_size(title: str, cells: dict[tuple[str, int | None], str]) -> list[str]:
    """Return a table of cells by name and code size: a row for each name."""
    names, sizes = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    rows = ([name, *(cells.get((name, size), "") for size in sizes)] for name in names)
    return markdown([title, *(f"{size} B" if size else "uncoded" for size in sizes)], rows)


def recall_table(body: dict[str, Any], k: str, nprobe: int) -> list[str]:
    """Return recall@k by contender and code size, at one number of lists visited."""
    shown = [e for e in body["neighbours"] if e["nprobe"] in (None, nprobe)]
    cells = {(NAMES[e["contender"]], e["bytes"]): f"{e['recall'][k]:.3f}" for e in shown}
    return table_by_size(f"recall@{k}", cells)


def flag_table(body: dict[str, Any]) -> list[str]:
    """Return the recall of duplicate flags at each precision, by contender and rule."""
    cells = {
        (f"{NAMES[e['contender']]}, {e['rule']}", e["bytes"]): " / ".join(
            f"{point['recall']:.2f}" for point in e["at"]
        )
        for e in body["flags"]
    }
    wanted = " / ".join(f"{point['wanted']:.2f}" for point in body["flags"][0]["at"])
    return table_by_size(f"recall at precision {wanted}", cells)


def text_table(body: dict[str, Any]) -> list[str]:
    """Return how often texts and pictures find each other, with 95 % intervals."""
    rows = (
        [f"{NAMES[e['contender']]}, {e['direction']}",
         *(f"{s['recall']:.3f} ({s['low']:.3f} – {s['high']:.3f})" for s in (e["1"], e["10"]))]
        for e in body["text"]
    )  # fmt: skip
    return markdown(["uncoded", "recall@1", "recall@10"], rows)


def eval_page(body: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    settings, nprobe = body["settings"], body["budget"][0]["nprobe"]
    stages = ("encoder", "code", "probes", "recall")
    lost = (
        [f"{NAMES[e['contender']]}, {e['bytes']} B", *(f"{e[name]:.3f}" for name in stages)]
        for e in body["budget"]
    )
    lines = [
        "# Evaluation",
        "",
        f"{body['rows']:,} rows × {body['dim']}; {body['queries']:,} of them asked for their "
        f"neighbours among all, against exact cosine. {body['learned_rows']:,} others, and no copy "
        f"of a query, were learnt from. IVF{body['nlist']}, nprobe {nprobe}.",
        "",
    ]
    if settings["encoder"]:
        lines += ["The SNIP encoder was given: it may have learnt from queries.", ""]
    for k in body["neighbours"][0]["recall"]:
        lines += recall_table(body, k, nprobe)
    lines += [
        "## Where recall@10 is lost",
        "",
        *markdown(["lost by", "encoder", "code", "probes", "left"], lost),
        "## Duplicate flags",
        "",
        f"A query is flagged if its best neighbour passes; {body['duplicates']:,} queries have a "
        f"row at or above cosine {settings['threshold']:g}. nprobe {settings['flag_nprobe']}.",
        "",
        *flag_table(body),
    ]
    if "text" in body:
        among = body["text"][0]["among"]
        lines += ["## Text and images", "", f"Own partner among {among:,}; 95 % intervals.", ""]
        lines += text_table(body)
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in body["seconds"].items())
    return "\n".join([*lines, f"Seconds: {seconds}.", ""])


def eval_summary(body: dict[str, Any]) -> str:
    """Return what the command prints."""
    nprobe = body["budget"][0]["nprobe"]
    lines = [
        f"{body['rows']:,} rows, {body['queries']:,} queries, IVF{body['nlist']}, nprobe "
        f"{nprobe}; {body['duplicates']:,} queries have a duplicate",
        "",
        *recall_table(body, "10", nprobe),
        *flag_table(body),
        *(text_table(body) if "text" in body else []),
    ]
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in body["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}"])


# ---- the picture


def draw_picture(body: dict[str, Any], path: Path) -> None:
    """Draw recall by bytes, recall by lists visited, duplicate flags and the loss by stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    draw_recall(axes[0, 0], axes[0, 1], body)
    draw_flags(axes[1, 0], body)
    draw_budget(axes[1, 1], body)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.savefig(path, format="png", metadata={"Software": None})  # no version: same bytes


def draw_recall(left: Any, right: Any, body: dict[str, Any]) -> None:
    """Draw recall@10 against the size of a code, and against lists visited at the largest size.

    Dotted lines at the left: without a code.
    """
    nprobe, measured = body["budget"][0]["nprobe"], body["neighbours"]
    sizes = sorted({e["bytes"] for e in measured if e["bytes"]})
    visited = sorted({e["nprobe"] for e in measured if e["nprobe"]})
    for name, style in LINES.items():
        mine = [e for e in measured if e["contender"] == name]
        coded = [(e["bytes"], e["recall"]["10"]) for e in mine if e["nprobe"] == nprobe]
        probed = [(e["nprobe"], e["recall"]["10"]) for e in mine if e["bytes"] == sizes[-1]]
        for axis, points in ((left, coded), (right, probed)):
            if points:
                axis.plot(*zip(*points, strict=True), label=NAMES[name], **style)
        for height in (e["recall"]["10"] for e in mine if e["bytes"] is None and name != "raw"):
            left.axhline(height, color=style["color"], ls=":", lw=1)
            left.text(sizes[0], height, f"{NAMES[name]} uncoded", color=style["color"],
                      fontsize=7, va="bottom")  # fmt: skip
    every = [f"{n:,}" if n < body["nlist"] else f"all {n:,}" for n in visited]
    left.set(xlabel="bytes a row", title=f"Neighbours by code size (nprobe {nprobe})")
    right.set(xlabel="lists visited", title=f"Neighbours by lists visited ({sizes[-1]} bytes)")
    for axis, ticks, texts in ((left, sizes, map(str, sizes)), (right, visited, every)):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, list(texts))
        axis.minorticks_off()
        axis.set_ylabel("recall@10")
    left.legend(frameon=False, fontsize=8)


def draw_flags(axis: Any, body: dict[str, Any]) -> None:
    """Draw precision against recall of the SNIP descriptors' duplicate flags, by rule and size."""
    flags = [e for e in body["flags"] if e["contender"] == "snip"]
    sizes = sorted({e["bytes"] for e in body["flags"]})
    colours = dict(zip(sizes, itertools.cycle(SHADES), strict=False))
    for entry in flags:
        points = sorted(
            (p["recall"], p["precision"]) for p in entry["curve"] if p["recall"] and p["precision"]
        )
        if points:
            axis.plot(*zip(*points, strict=True), STYLES[entry["rule"]],
                      color=colours[entry["bytes"]],
                      label=f"{entry['rule']}, {entry['bytes']} B")  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0.49, 1.01),
             title="Duplicate flags of SNIP codes")  # fmt: skip
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="lower left")


def draw_budget(axis: Any, body: dict[str, Any]) -> None:
    """Draw recall@10 left, and what each stage takes."""
    lines = [e for e in body["budget"] if e["contender"] != "opq"]
    names = list(dict.fromkeys(e["contender"] for e in lines))
    at = [number + GAP * names.index(e["contender"]) for number, e in enumerate(lines)]
    bottom = [0.0] * len(lines)
    for stage, colour in STAGES.items():
        heights = [max(e[stage], 0) for e in lines]
        name = "kept" if stage == "recall" else f"lost by the {stage}"
        axis.bar(at, heights, bottom=bottom, color=colour, label=name, width=0.85)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for place, height in zip(at, (e["recall"] for e in lines), strict=True):
        axis.text(place, height / 2, f"{height:.2f}", ha="center", va="center", color="white",
                  fontsize=7)  # fmt: skip
    axis.set_xticks(at, [f"{NAMES[e['contender']].split()[0]}\n{e['bytes']} B" for e in lines])
    axis.tick_params(axis="x", labelsize=7, length=0)
    axis.set(ylabel="recall@10", title="Where recall is lost", ylim=(0, 1.25),
             yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])  # fmt: skip
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
