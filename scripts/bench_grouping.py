"""Measure grouping and writing of random groups: time, anonymous memory and disk by rows.

python scripts/bench_grouping.py --rows 1e6 1e7 1e8 --out docs/benchmarks/grouping.json

A forest over random groups with a heavy tail is written to a file, a table of keys and URLs beside
it; then one process, which is the one measured, decides by star and writes OUT as ``snip dedup``
does. All rows of a group are alike, so that the rows need not exist: one of each group stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench_components
import numpy as np
import timing

sys.path.insert(0, str(timing.ROOT))

from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.result import checked, choose
from snipdedup.deduplication.write_out import MetadataPlan, write_files
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.keep import rank_by
from snipdedup.join.forest import Edges
from snipdedup.metadata.additions import ColumnSettings
from snipdedup.metadata.tables import open_metadata

DIM = 8
SHARD = 1_000_000  # rows of a file of metadata
IN_GROUPS = 0.53  # share of the rows that lie in groups, at 30 % that go
COPIES = 3  # one of so many edges joins an exact copy, where that is the later row


def main() -> None:
    """Parse the arguments and measure each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--work", type=Path, help="where the files lie; a temporary folder if none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--giant", type=float, default=0.0, help="share of the largest group")
    parser.add_argument("--metadata", action="store_true", help="write metadata too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.work, int(options.rows[0]))))
        return
    machine, runs = timing.machine(), []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="grouping-") as folder:
            runs.append(run_child(Path(folder), int(rows), options))
        print(json.dumps(runs[-1]), flush=True)
    body: dict[str, object] = {
        "kind": "grouping",
        "measured": time.strftime("%Y-%m-%d"),
        "machine": machine,
    }
    if options.out:
        body |= {"seed": options.seed, "giant": options.giant, "runs": runs}
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def run_child(folder: Path, rows: int, options: argparse.Namespace) -> dict[str, object]:
    """Write what a search would have found, and measure another process that goes on with it."""
    write_found(folder, rows, options.seed, int(options.giant * rows))
    if options.metadata:
        write_metadata(folder / "metadata", rows)
    log = folder / "log"
    command = [sys.executable, __file__, "--child", "--work", str(folder), "--rows", str(rows)]
    timing.run_timed(command, log)
    result: dict[str, object] = json.loads(log.read_text().splitlines()[-1])
    return result


def write_found(folder: Path, rows: int, seed: int, giant: int) -> None:
    """Write a forest as ``a``, ``b``, ``similarity``, and exact copies, in bounded memory."""
    stride = bench_components.scattering_stride(rows)
    files = {name: (folder / name).open("wb") for name in ("a", "b", "copy", "first")}
    for number, (start, stop) in enumerate(plan_blocks(rows, bench_components.BLOCK)):
        rng = np.random.default_rng([seed, number])
        first = bench_components.group_firsts(rng, start, stop, giant)
        group = np.unique(first)
        lone = np.isin(first, group[rng.random(len(group)) > IN_GROUPS]) & (first >= giant)
        row = np.arange(start, stop)
        edge = np.flatnonzero((row > first) & ~lone)
        ends = np.stack([first[edge] * stride % rows, row[edge] * stride % rows]).astype("<i8")
        copied = (np.arange(len(edge)) % COPIES == 0) & (ends[0] < ends[1])  # of an earlier row
        ends.sort(axis=0)
        for names, part in ((("a", "b"), ~copied), (("first", "copy"), copied)):
            for name, end in zip(names, ends, strict=True):
                end[part].tofile(files[name])
    for file in files.values():
        file.close()


def write_metadata(folder: Path, rows: int) -> None:
    """Write a key and a URL for each row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number, (start, stop) in enumerate(plan_blocks(rows, SHARD)):
        row = np.arange(start, stop)
        key = np.char.zfill(row.astype("U"), 12)
        url = np.char.add("https://example.org/", (row // 3).astype("U"))
        pq.write_table(pa.table({"key": key, "url": url}), folder / f"part-{number:05d}.parquet")


class Alike(Features):
    """Rows that are all alike and need no room."""

    def __init__(self, rows: int) -> None:
        self.rows, self.dim, self.dtype = rows, DIM, np.dtype(np.float16)
        self.offsets, self.shards = np.array([0, rows]), ()

    def gather_ascending(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return ones."""
        found = np.empty((len(rows), DIM), self.dtype) if out is None else out[: len(rows)]
        found[:] = 1
        return found


def measure(folder: Path, rows: int) -> dict[str, object]:
    """Decide and write; return times and peaks of memory beyond what libraries hold."""
    import faiss
    import torch

    del faiss, torch
    search = load_search(folder, rows)
    metadata = open_metadata(folder / "metadata") if (folder / "metadata").is_dir() else None
    peaks, done = [0], threading.Event()
    threading.Thread(target=bench_components.watch, args=(peaks, done), daemon=True).start()
    out, before = folder / "out", timing.anonymous("self")
    (out / "work").mkdir(parents=True)
    marks, spent, held = time.perf_counter(), {}, {}

    def mark(name: str) -> None:
        nonlocal marks
        spent[name] = round(time.perf_counter() - marks, 2)
        held[name], peaks[0] = peaks[0] - before, 0
        marks = time.perf_counter()

    rank = rank_by("first", 0, None)
    result = checked(choose(search, 0.95, "star", "first", rank, folder=out / "work"))
    mark("group")
    plan = None if metadata is None else MetadataPlan(metadata, "key", ColumnSettings(), {})
    write_files(result, out, plan, ())
    mark("write")
    done.set()
    sizes = {path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    return {
        "rows": rows, "edges": len(search.forest.a) + len(search.copies),
        "members": len(result.members.row), "removed": result.removed,
        "groups": sum(result.counts.sizes.values()),
        "largest": max(result.counts.sizes, default=1),
        "seconds": spent, "peak": held, "before": before,
        "bytes_a_row": {name: round(size / rows, 2) for name, size in held.items()},
        "disk": sum(sizes.values()),
    }  # fmt: skip


def load_search(folder: Path, rows: int) -> PairSearch:
    """Return what was written, mapped."""
    a, b, copy, first = (
        np.memmap(folder / name, "<i8", "r") for name in ("a", "b", "copy", "first")
    )
    order = np.argsort(copy)  # as a search lists them
    listed = [folder / name for name in ("copies.npy", "firsts.npy")]
    for path, column in zip(listed, (copy, first), strict=True):
        np.save(path, column[order])
    del order
    copies, firsts = (np.load(path, mmap_mode="r") for path in listed)
    similarity = np.broadcast_to(np.float32(0.97), len(a))
    return PairSearch(
        names=["imagined.npy"],
        offsets=np.array([0, rows]),
        threshold=0.95,
        forest=Edges(a, b, similarity),
        copies=copies,
        originals=firsts,
        bad=np.empty(0, np.int64),
        inputs=Inputs(Alike(rows)),
        checksums={"features": []},
    )


if __name__ == "__main__":
    main()
