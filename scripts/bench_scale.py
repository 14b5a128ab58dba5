"""Measure `snip dedup`, and the commands after it, on sets of 10 to 100 million rows.

    python scripts/bench_scale.py WORK --rows 1e7 3.2e7 1e8 --out FILE.json

Each set is made by synthetic.py (--spectrum hierarchical, float16). The steps of a set are: make
it, run `snip dedup`, judge a sample of its rows by brute force, run the other commands. A step that
is in FILE.json already is not done again, so a stopped run goes on. WORK needs about 600 bytes a
row of 96 numbers.

Of a run are written: wall and CPU seconds, the stages, the largest memory (anonymous, pages that
workers share once; and the largest resident memory of a process, mapped files included), bytes read
from and written to the disk, and the most bytes in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from check_plan import watch as watch_folder
from timing import ROOT, machine, run_timed, tree, warm

from snipdedup.features.cosine import PROPOSAL_ERROR, pair_cosine, unit_rows
from snipdedup.features.shards import Features, open_features

SNIP = [sys.executable, "-m", "snipdedup"]
BLOCK = 1 << 16  # rows compared with all queries at a time
IO = ("read_bytes", "write_bytes")  # of /proc/PID/io
INTERVAL = 1.0  # seconds between looks at them
HIGHER = 0.97  # threshold of the second decision


def main(argv: Sequence[str] | None = None) -> None:
    """Do all steps that FILE.json does not have."""
    given = parse(argv)
    body: dict[str, Any] = {"kind": "scale"}
    if given.out.is_file():
        body = json.loads(given.out.read_text(encoding="utf-8"))
    body.setdefault("machine", machine())
    for rows in map(int, given.rows):
        done = body.setdefault("sets", {}).setdefault(f"{rows}x{given.dim}", {})
        folder = given.work / f"{rows}x{given.dim}"
        for name, step in steps(folder, rows, given).items():
            if name in done or name in given.skip:
                continue
            say(f"{rows:,} rows: {name}")
            done[name] = step()
            given.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        if given.remove:
            shutil.rmtree(folder, ignore_errors=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for the sets and their results")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or go on with")
    parser.add_argument("--rows", type=float, nargs="+", default=[1e7])
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--sample", type=int, default=5000, help="rows judged by brute force")
    parser.add_argument("--flags", nargs="*", default=[], help="more for snip dedup")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out")
    parser.add_argument("--remove", action="store_true", help="remove each set when it is done")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def steps(folder: Path, rows: int, given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the steps of a set by name, in order."""
    features, out = folder / "img_emb", folder / "out"
    limit = ["--threshold", str(given.threshold)]
    return {
        "make": partial(make, folder, rows, given),
        "dedup": partial(deduplicate, features, out, [*limit, *given.flags]),
        "recall": partial(judge, features, out, given),
        "audit": partial(
            command, folder, ["audit", str(out), str(features), "--sample", str(given.sample)]
        ),
        "report": partial(command, folder, ["report", str(out), "--overwrite"]),
        "rethreshold": partial(
            command, folder,
            ["dedup", str(out), "--threshold", str(HIGHER), "--out", str(folder / "higher")],
        ),
        "filter": partial(
            command, folder,
            ["filter", str(folder / "metadata"), "--is_dup", str(out), "--out",
             str(folder / "kept")],
        ),
    }  # fmt: skip


def make(folder: Path, rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """Make the set, and metadata with a key and a url for each row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [str(folder), "--rows", str(rows), "--dim", str(given.dim), "--seed", str(given.seed)]
    script = str(ROOT / "scripts" / "synthetic.py")
    folder.mkdir(parents=True, exist_ok=True)
    spectrum = ["--spectrum", "hierarchical"]
    timed = run_timed([sys.executable, script, *words, *spectrum], folder / "make.log")
    opened = open_features(folder / "img_emb")
    (folder / "metadata").mkdir(exist_ok=True)
    start = 0
    for shard in opened.shards:
        keys = np.char.mod("%011d", np.arange(start, start + shard.rows))
        start += shard.rows
        urls = np.char.add("https://host.invalid/", keys)
        path = folder / "metadata" / f"{shard.path.stem.replace('img_emb', 'metadata')}.parquet"
        pq.write_table(pa.table({"key": keys, "url": urls}), path)
    return {"seconds": timed.seconds, "bytes": sum(path.stat().st_size for path in opened.paths())}


def deduplicate(features: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """Run ``snip dedup`` once; what a stopped run left is used."""
    warm(open_features(features).paths())
    disk, done = [0], threading.Event()
    watcher = threading.Thread(target=watch_folder, args=(out, disk, done))
    watcher.start()
    measured = command(out.parent, ["dedup", str(features), "--out", str(out), *flags])
    done.set()
    watcher.join()
    manifest = json.loads((out / "snip.json").read_text(encoding="utf-8"))
    kept = ("counts", "method", "seconds")
    return {**measured, "disk": disk[0], "manifest": {name: manifest[name] for name in kept}}


def command(folder: Path, words: list[str]) -> dict[str, Any]:
    """Run a command of snip and return what it took."""
    moved, done = dict.fromkeys((*IO, "resident"), 0), threading.Event()
    watcher = threading.Thread(target=watch_process, args=(moved, done))
    watcher.start()
    try:
        timed = run_timed([*SNIP, *words], folder / f"{words[0]}.log", shared_once=True)
    finally:
        done.set()
        watcher.join()
    say(
        f"  {timed.seconds:,.0f} s, {timed.cpu_seconds:,.0f} CPU seconds, {timed.peak / 1e9:.2f} GB"
    )
    return {
        "seconds": timed.seconds, "cpu_seconds": timed.cpu_seconds, "anonymous": timed.peak, **moved
    }  # fmt: skip


def watch_process(moved: dict[str, int], done: threading.Event) -> None:
    """Hold the bytes read and written by this process's children, and their largest resident size.

    What a process moved after the last look, a second before its end at most, is not counted.
    """
    seen: dict[int, dict[str, int]] = {}
    while not done.wait(INTERVAL):
        pids = tree(os.getpid())[1:]
        for pid in pids:
            seen[pid] = {**seen.get(pid, {}), **numbers(f"/proc/{pid}/io", IO)}
        resident = [
            1024 * numbers(f"/proc/{pid}/status", ("VmRSS",)).get("VmRSS", 0) for pid in pids
        ]
        moved["resident"] = max([moved["resident"], *resident])
        for name in IO:
            moved[name] = sum(one.get(name, 0) for one in seen.values())


def numbers(path: str, names: tuple[str, ...]) -> dict[str, int]:
    """Return numbers of a file of /proc by name; none where it is gone."""
    try:
        lines = [line.partition(":") for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(text.split()[0]) for name, _, text in lines if name in names}


def judge(features: Path, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Compare a sample of rows with all rows, by brute force, and with what was found.

    ``row_recall``: of the sampled rows with a match, the share that is in a group. ``pair_recall``:
    of their pairs, the share in one group. ``proved``: of the sampled rows that were removed, the
    share whose cosine with their representative reaches the threshold.
    """
    import pyarrow.parquet as pq

    opened = open_features(features)
    rng, begin = np.random.default_rng(given.seed + 1), time.perf_counter()
    sample = np.sort(rng.choice(opened.rows, min(given.sample, opened.rows), replace=False))
    s, r = true_pairs(opened, sample, given.threshold)
    group = np.arange(opened.rows)
    representative = np.arange(opened.rows)
    for batch in pq.ParquetFile(out / "groups.parquet").iter_batches(
        columns=["row", "group", "representative"]
    ):
        row, of, kept = (column.to_numpy() for column in batch.columns)
        group[row], representative[row] = of, kept
    found = group[sample[s]] == group[r]
    matched = np.unique(s)
    sizes = np.bincount(group, minlength=opened.rows)[group[sample[matched]]]
    removed = sample[np.load(out / "is_dup.npy", mmap_mode="r")[sample]]
    kept = representative[removed]
    order = np.argsort(kept)
    cosines = pair_cosine(opened.gather(removed[order]), opened.gather(kept[order]))
    return {
        "sample": len(sample), "pairs": len(s), "rows_with_match": len(matched),
        "row_recall": float((sizes > 1).mean()), "pair_recall": float(found.mean()),
        "removed": len(removed),
        "proved": float((cosines >= np.float32(given.threshold)).mean()),
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def true_pairs(
    opened: Features, sample: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return places in the sample, and rows, of all pairs of a sampled row and another row."""
    parts = list(sampled_pairs(opened, sample, threshold))
    return np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts])


def sampled_pairs(
    opened: Features, sample: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same, by blocks of rows: products in float32, then float64 cosines."""
    import torch

    raw = opened.gather(sample)
    queries = torch.from_numpy(unit_rows(raw))
    for start, block in opened.blocks(BLOCK):
        products = queries @ torch.from_numpy(unit_rows(block)).T
        s, r = torch.nonzero(products >= threshold - PROPOSAL_ERROR).numpy().T
        other = sample[s] != start + r
        s, r = s[other], r[other]
        true = pair_cosine(raw[s], block[r]) >= np.float32(threshold)
        yield s[true], start + r[true]


def say(text: str) -> None:
    """Show how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
