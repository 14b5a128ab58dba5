"""Measure forest and components of random groups: time, anonymous memory and disk by rows.

python scripts/bench_components.py --rows 1e6 1e7 1e8 --out docs/benchmarks/components.json

Edges, 1.3 a row that has one, are written to files first; then one process, which is the one
measured, reads them in small steps, as tasks of a join give them. Groups have heavy tails: one of a
twentieth of all rows, the others of 1 to many thousands of rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import timing

sys.path.insert(0, str(timing.ROOT))

from snipdedup.join.forest import ExternalForest, components, make_edges

BLOCK = 1_000_000  # rows whose groups are made together
TAIL = 1.2  # exponent of the sizes of groups
MORE = 0.3  # edges beyond a tree, as a share of it
STEP = 200_000  # edges given at a time
NODE, SIMILARITY = np.dtype("<u4"), np.dtype("<f4")


def main() -> None:
    """Parse the arguments and measure each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--work", type=Path, help="where the files lie; a temporary folder if none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.work, int(options.rows[0]))))
        return
    machine, runs = timing.machine(), []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="components-") as folder:
            runs.append(run_child(Path(folder), int(rows), options.seed))
        print(json.dumps(runs[-1]), flush=True)
    body = {
        "kind": "components",
        "measured": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "seed": options.seed,
        "runs": runs,
    }
    if options.out:
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def run_child(folder: Path, rows: int, seed: int) -> dict[str, object]:
    """Write edges, and measure another process that reads them."""
    write_edges(folder, rows, seed)
    log = folder / "log"
    command = [sys.executable, __file__, "--child", "--work", str(folder), "--rows", str(rows)]
    found = timing.run_timed(command, log)
    result: dict[str, object] = json.loads(log.read_text().splitlines()[-1])
    return {**result, "process_seconds": round(found.seconds, 2), "process_peak": found.peak}


def write_edges(folder: Path, rows: int, seed: int) -> None:
    """Write the edges of random groups as ``a``, ``b``, ``similarity``, in bounded memory."""
    stride = scattering_stride(rows)
    with (
        (folder / "a").open("wb") as a,
        (folder / "b").open("wb") as b,
        (folder / "similarity").open("wb") as similarity,
    ):
        for number, start in enumerate(range(0, rows, BLOCK)):
            rng = np.random.default_rng([seed, number])
            first = group_firsts(rng, start, min(start + BLOCK, rows), rows // 20)
            row = np.arange(start, start + len(first))
            row, first = row[row > first], first[row > first]
            more = rng.integers(0, len(row), int(MORE * len(row)))
            row, first = np.append(row, row[more]), np.append(first, first[more])
            other = first + (rng.random(len(row)) * (row - first)).astype(np.int64)
            for file, ends in ((a, row), (b, other)):
                (ends * stride % rows).astype(NODE).tofile(file)
            rng.uniform(0.95, 1, len(row)).astype(SIMILARITY).tofile(similarity)


def scattering_stride(rows: int) -> int:
    """Return a number near the golden section of ``rows`` that has no divisor with it."""
    stride = int(rows * 0.6180339887)
    while np.gcd(stride, rows) != 1:
        stride += 1
    return stride


def group_firsts(rng: np.random.Generator, start: int, stop: int, giant: int) -> np.ndarray:
    """Return for rows ``start`` to ``stop`` the first of each one's group; ``giant`` are one."""
    sizes = np.ceil(rng.pareto(TAIL, stop - start) + 1).astype(np.int64)
    cuts = start + np.cumsum(sizes)
    cuts = np.concatenate([[start], cuts[cuts < stop]])
    first = np.repeat(cuts, np.diff(np.append(cuts, stop)))
    first[: max(0, giant - start)] = 0
    return first


def measure(folder: Path, rows: int) -> dict[str, object]:
    """Read edges, and find their forest and components; return times and peaks of memory."""
    columns = [
        np.memmap(folder / name, kind, "r")
        for name, kind in (("a", NODE), ("b", NODE), ("similarity", SIMILARITY))
    ]
    peaks, done = [0], threading.Event()
    threading.Thread(target=watch, args=(peaks, done), daemon=True).start()
    before = timing.anonymous("self")
    start = time.perf_counter()
    builder = ExternalForest(folder / "forest", rows)
    for low in range(0, len(columns[0]), STEP):
        builder.add(make_edges(*(np.array(column[low : low + STEP]) for column in columns)))
    taken = time.perf_counter()
    forest = builder.forest()
    found, forest_peak = time.perf_counter(), peaks[0]
    disk = sum(path.stat().st_size for path in (folder / "forest").glob("*"))
    del builder
    peaks[0] = 0
    label = components(forest)[1]
    end = time.perf_counter()
    done.set()
    result = {
        "rows": rows,
        "edges": len(columns[0]),
        "forest_edges": len(forest.a),
        "groups": int(np.count_nonzero(np.diff(np.sort(label)))) + 1,
        "largest": int(np.bincount(label).max()),
        "seconds": {
            "add": round(taken - start, 2),
            "forest": round(found - taken, 2),
            "components": round(end - found, 2),
        },
        "peak": {"before": before, "forest": forest_peak, "components": peaks[0]},
        "disk": disk,
    }
    shutil.rmtree(folder / "forest", ignore_errors=True)
    return result


def watch(peaks: list[int], done: threading.Event) -> None:
    """Raise ``peaks[0]`` to the most anonymous memory of this process that is seen."""
    while not done.wait(timing.INTERVAL):
        peaks[0] = max(peaks[0], timing.anonymous("self"))


if __name__ == "__main__":
    main()
