"""The picture of an evaluation, by matplotlib (extra: plot)."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError
from snipdedup.evaluation.tables import NAMES, shown_nprobe

COLOURS = {"raw": "0.45", "opq": "#c58b00", "pca": "#3b78b5", "mse": "#7a4fa3", "snip": "#c2272d"}
MARKS = {"raw": "s", "opq": "D", "pca": "o", "mse": "^", "snip": "o"}
SHADES = ("#e8a33d", "#c2272d", "#5b1a4b", "#3b78b5")  # of flags, by code size
STAGES = {"recall": "#4d8f52", "probes": "#b9d3ea", "code": "#6fa3d0", "encoder": "#1f4e79"}
SIZE, DPI = (11, 8), 110
GAP = 0.7  # between the bars of two contenders


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
    nprobe, sizes = shown_nprobe(body), body_sizes(body)
    for name in NAMES:
        mine = [e for e in body["neighbours"] if e["contender"] == name]
        coded = [(e["bytes"], e["recall"]["10"]) for e in mine if e["nprobe"] == nprobe]
        if coded:
            axis.plot(*zip(*coded, strict=True), marker=MARKS[name], color=COLOURS[name],
                      label=NAMES[name], lw=2.4 if name == "snip" else 1.4)  # fmt: skip
        for entry in mine:
            if entry["bytes"] is None and name != "raw":
                height = entry["recall"]["10"]
                axis.axhline(height, color=COLOURS[name], ls=":", lw=1)
                axis.text(sizes[0], height, f"{NAMES[name]} uncoded", color=COLOURS[name],
                          fontsize=7, va="bottom")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set(xlabel="bytes a row", ylabel="recall@10",
             title=f"Neighbours by code size (nprobe {nprobe})")  # fmt: skip
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
    visited = sorted({e["nprobe"] for e in body["neighbours"] if e["nprobe"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(visited, [f"{n:,}" if n < body["nlist"] else f"all {n:,}" for n in visited])
    axis.minorticks_off()
    axis.set(xlabel="lists visited", ylabel="recall@10",
             title=f"Neighbours by lists visited ({size} bytes)")  # fmt: skip


def by_flag(axis: Any, body: dict[str, Any]) -> None:
    """Precision against recall of the SNIP descriptors' duplicate flags, by rule and size."""
    styles = {"difference": "-", "ratio": "--", "global": ":"}
    colours = dict(zip(body_sizes(body), itertools.cycle(SHADES), strict=False))
    for entry in body["flags"]:
        if entry["contender"] != "snip":
            continue
        points = sorted(
            (p["recall"], p["precision"]) for p in entry["curve"] if p["recall"] and p["precision"]
        )
        if points:
            axis.plot(*zip(*points, strict=True), styles[entry["rule"]],
                      color=colours[entry["bytes"]],
                      label=f"{entry['rule']}, {entry['bytes']} B")  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0.49, 1.01),
             title="Duplicate flags of SNIP codes")  # fmt: skip
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="lower left")


def by_stage(axis: Any, body: dict[str, Any]) -> None:
    """Recall@10 left, and what each stage takes."""
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


def body_sizes(body: dict[str, Any]) -> list[int]:
    """Return the code sizes measured, ascending."""
    return sorted({e["bytes"] for e in body["neighbours"] if e["bytes"]})
