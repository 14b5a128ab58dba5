"""The picture of an evaluation, by matplotlib (extra: plot)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError
from snipdedup.trust.tabulate import NAMES, shown_nprobe

COLOURS = {"raw": "0.45", "opq": "#c58b00", "pca": "#3b78b5", "mse": "#7a4fa3", "snip": "#c2272d"}
MARKS = {"raw": "s", "opq": "D", "pca": "o", "mse": "^", "snip": "o"}
STAGES = {"recall": "#4d8f52", "probes": "#b9d3ea", "code": "#6fa3d0", "encoder": "#1f4e79"}
SIZE, DPI = (11, 8), 110


def need_matplotlib() -> None:
    """Refuse before any work where the extra is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SnipError(
            "the picture needs matplotlib: pip install 'snipdedup-toolkit[plot]', or leave it out "
            "with --nopicture"
        )


def draw(body: dict[str, Any], path: Path) -> None:
    """Draw recall by bytes, recall by lists visited, duplicate flags and the loss by stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    by_bytes(axes[0, 0], body)
    by_nprobe(axes[0, 1], body)
    by_flag(axes[1, 0], body)
    by_stage(axes[1, 1], body)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.savefig(path, format="png", metadata={"Software": None})  # no version: same bytes


def by_bytes(axis: Any, body: dict[str, Any]) -> None:
    """Recall@10 against the size of a code; dotted: without a code."""
    nprobe = shown_nprobe(body)
    for name in NAMES:
        mine = [e for e in body["neighbours"] if e["contender"] == name]
        coded = [(e["bytes"], e["recall"]["10"]) for e in mine if e["nprobe"] == nprobe]
        if coded:
            axis.plot(*zip(*coded, strict=True), marker=MARKS[name], color=COLOURS[name],
                      label=NAMES[name], lw=2.4 if name == "snip" else 1.4)  # fmt: skip
        for entry in mine:
            if entry["bytes"] is None and name != "raw":
                axis.axhline(entry["recall"]["10"], color=COLOURS[name], ls=":", lw=1)
    sizes = body_sizes(body)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set(xlabel="bytes a row", ylabel="recall@10",
             title=f"Neighbours by code size (nprobe {nprobe}; dotted: uncoded)")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def by_nprobe(axis: Any, body: dict[str, Any]) -> None:
    """Recall@10 against lists visited, at the largest code size."""
    size = body_sizes(body)[-1]
    for name in NAMES:
        points = [
            (e["nprobe"], e["recall"]["10"])
            for e in body["neighbours"]
            if e["contender"] == name and e["bytes"] == size
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker=MARKS[name], color=COLOURS[name],
                      lw=2.4 if name == "snip" else 1.4)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set(xlabel=f"lists visited of {body['nlist']:,}", ylabel="recall@10",
             title=f"Neighbours by lists visited ({size} bytes)")  # fmt: skip


def by_flag(axis: Any, body: dict[str, Any]) -> None:
    """Precision against recall of the SNIP descriptors' duplicate flags, by rule."""
    styles = {"difference": "-", "ratio": "--", "global": ":"}
    sizes = body_sizes(body)
    for entry in body["flags"]:
        if entry["contender"] != "snip":
            continue
        points = sorted(
            (p["recall"], p["precision"]) for p in entry["curve"] if p["recall"] and p["precision"]
        )
        shade = 0.3 + 0.7 * (sizes.index(entry["bytes"]) + 1) / len(sizes)
        if points:
            axis.plot(*zip(*points, strict=True), styles[entry["rule"]], color=COLOURS["snip"],
                      alpha=shade, label=f"{entry['rule']}, {entry['bytes']} B")  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0.49, 1.01),
             title="Duplicate flags of SNIP codes")  # fmt: skip
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="lower left")


def by_stage(axis: Any, body: dict[str, Any]) -> None:
    """Recall@10 left, and what each stage takes."""
    lines = [e for e in body["budget"] if e["contender"] != "opq"]
    labels = [f"{NAMES[e['contender']].split()[0]}\n{e['bytes']} B" for e in lines]
    bottom = [0.0] * len(lines)
    for stage, colour in STAGES.items():
        heights = [max(e[stage], 0) for e in lines]
        name = "kept" if stage == "recall" else f"lost by the {stage}"
        axis.bar(labels, heights, bottom=bottom, color=colour, label=name, width=0.8)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    axis.tick_params(axis="x", labelsize=7)
    axis.set(ylabel="recall@10", title="Where recall is lost", ylim=(0, 1.25))
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def body_sizes(body: dict[str, Any]) -> list[int]:
    """Return the code sizes measured, ascending."""
    return sorted({e["bytes"] for e in body["neighbours"] if e["bytes"]})
