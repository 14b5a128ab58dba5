"""What lists and an encoder cost the join: recall and overlap against brute force, and seconds.

Small sets are one list, so that their join loses nothing. Here their rows are cut into lists all
the same, as many as a large set would have a row and more, at several thresholds; and an encoder,
if given, makes the codes.

    python scripts/bench_recall.py --features FOLDER [--encoder FOLDER] [--thresholds .95 .98]

With --planted, sets of random rows with planted pairs, a new one for each seed, are searched as
they are. A sample holds few of their pairs, as of a large set:

    python scripts/bench_recall.py --planted 400000x64 --pairs 4000 --seeds 20 --out FILE.json

With --copies, each row of --features stands beside noisy copies of it: noise of the shape of the
set, to cosine .985 or, half of them, .9 to .95. What `--recall 1`, which misses none, finds is the
truth:

    python scripts/bench_recall.py --features FOLDER --copies 3 8 --seeds 3
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from synthetic import unit
from timing import machine

import snipdedup
from snipdedup.features.shards import open_features
from snipdedup.join import model

HEADER = "| threshold | lists | recall | overlap | visits a row | candidates a row | seconds |"
EASY, HARD, HARD_SHARE = 0.995, 0.952, 0.1  # cosines of planted pairs, and how many are hard
THRESHOLD, PROMISE = 0.95, 0.999


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; with --out, write what was measured on planted pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="folder of feature shards")
    parser.add_argument("--encoder", help="folder of a trained encoder")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.95, 0.98])
    parser.add_argument("--lists", type=int, nargs="*", default=[1, 146, 400])
    parser.add_argument("--planted", help="ROWSxDIM of random rows, instead of --features")
    parser.add_argument("--pairs", type=int, default=4000, help="planted ones")
    parser.add_argument("--copies", type=int, nargs="*", help="rows that each row becomes")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file that takes what --planted measures")
    given = parser.parse_args(argv)
    if given.planted:
        bench_planted(given)
    elif given.copies:
        bench_copies(given)
    else:
        bench_lists(given)


def bench_lists(given: argparse.Namespace) -> None:
    """Print a line for each threshold and number of lists."""
    print(HEADER + "\n|---:|---:|---:|---:|---:|---:|---:|")
    for threshold in given.thresholds:
        truth = snipdedup.dedup(given.features, method="exact", threshold=threshold)
        for lists in given.lists:
            print(line(truth, given.features, threshold, lists), flush=True)
        if given.encoder:
            found = line(truth, given.features, threshold, 1, encoder=given.encoder)
            print(found.replace("| 1 |", "| 1, encoder |", 1))


def line(
    truth: snipdedup.Result, features: str, threshold: float, lists: int, **settings: Any
) -> str:
    """Search with a number of lists; return a row of the table."""
    single = 0 if lists > 1 else 1 << 40
    with (
        mock.patch.object(model, "SINGLE_LIST_ROWS", single),
        mock.patch.object(model, "list_count", return_value=lists),
    ):
        start = time.perf_counter()
        found = snipdedup.dedup(features, threshold=threshold, **settings)
        seconds = time.perf_counter() - start
    recall = len(found.search.forest.a) / max(1, len(truth.search.forest.a))
    overlap = (found.is_dup & truth.is_dup).sum() / max(1, truth.is_dup.sum())
    rows, notes = len(found.is_dup), found.search.notes
    return (
        f"| {threshold} | {lists} | {recall:.5f} | {overlap:.5f} | {notes['visits'] / rows:.2f} | "
        f"{notes['candidates'] / rows:.1f} | {seconds:.1f} |"
    )


def bench_copies(given: argparse.Namespace) -> None:
    """Print a line for each number of copies and seed."""
    print("| rows | seed | recall | overlap | visits a row |\n|---:|---:|---:|---:|---:|")
    for count in given.copies:
        rows = with_copies(read_all(given.features), count, 0)
        truth = snipdedup.dedup(rows, recall=1.0)
        for seed in range(given.seeds):
            found = snipdedup.dedup(rows, seed=seed)
            recall = len(found.search.forest.a) / len(truth.search.forest.a)
            overlap = (found.is_dup & truth.is_dup).sum() / truth.is_dup.sum()
            visits = found.search.notes["visits"] / len(rows)
            shown = f"| {len(rows):,} | {seed} | {recall:.5f} | {overlap:.5f} | {visits:.2f} |"
            print(shown, flush=True)


def read_all(folder: str) -> np.ndarray:
    """Return all rows of a folder."""
    features = open_features(folder)
    return features.read(0, features.rows)


def with_copies(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return each row and count - 1 noisy copies of it, shuffled, float16."""
    rng = np.random.default_rng(seed)
    x = unit(rows.astype(np.float32))
    shape = np.linalg.cholesky(np.cov(x.T) + 1e-9 * np.eye(x.shape[1])).astype(np.float32)
    parts = [x.astype(np.float16)]
    for _ in range(count - 1):
        noise = rng.standard_normal(x.shape, np.float32) @ shape.T
        cosine = np.where(rng.random(len(x)) < 0.5, 0.985, rng.uniform(0.9, 0.95, len(x)))
        parts.append(beside(x, noise, cosine.astype(np.float32)).astype(np.float16))
    return rng.permutation(np.concatenate(parts))


def bench_planted(given: argparse.Namespace) -> None:
    """Search a planted set of each seed; print the table and write the file."""
    rows, dim = (int(number) for number in given.planted.split("x"))
    host, runs = machine(), []
    for seed in range(given.seeds):
        runs.append(planted_run(rows, dim, given.pairs, seed))
        print(json.dumps(runs[-1]), flush=True)
    body = {
        "kind": "recall",
        "measured": datetime.date.today().isoformat(),
        "machine": host,
        "rows": rows, "dim": dim, "pairs": given.pairs,
        "cosines": {"easy": EASY, "hard": HARD, "hard_share": HARD_SHARE},
        "runs": runs,
    }  # fmt: skip
    print(planted_line(body))
    if given.out:
        given.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def planted_run(rows: int, dim: int, pairs: int, seed: int) -> dict[str, Any]:
    """Search the planted set of a seed; of seed 0 count all pairs, planted or not, besides."""
    features, a, b = planted(rows, dim, pairs, seed)
    every = None
    if seed == 0:
        every = len(snipdedup.dedup(features, recall=1.0, threshold=THRESHOLD).search.forest.a)
    start = time.perf_counter()
    found = snipdedup.dedup(features, seed=seed, threshold=THRESHOLD).search
    seconds = time.perf_counter() - start
    met = np.isin(
        np.minimum(a, b) * rows + np.maximum(a, b), found.forest.a * rows + found.forest.b
    )
    return {
        "seed": seed,
        "recall": float(met.mean()),
        "missed": int((~met).sum()),
        "calibration_pairs": found.notes["calibration_pairs"],
        "visits": round(found.notes["visits"] / rows, 2),
        "seconds": round(seconds, 2),
        "pairs_at_recall_1": every,
    }


def planted_line(body: dict[str, Any]) -> str:
    """Return a line of the table in docs/internals/calibration.md."""
    recalls = [run["recall"] for run in body["runs"]]
    kept = sum(recall >= PROMISE for recall in recalls)
    seen = [run["calibration_pairs"] for run in body["runs"]]
    visits = np.mean([run["visits"] for run in body["runs"]])
    return (
        f"| {body['rows']:,} × {body['dim']}, {body['pairs']:,} pairs | {kept} of {len(recalls)} | "
        f"{min(recalls):.5f} | {np.mean(recalls):.5f} | {min(seen)} to {max(seen)} | {visits:.1f} |"
    )


def planted(
    rows: int, dim: int, pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random unit rows, float32, and the places of the two rows of each planted pair."""
    rng = np.random.default_rng(seed)
    x = unit(rng.standard_normal((rows, dim), np.float32))
    a, b = rng.permutation(rows)[: 2 * pairs].reshape(2, -1)
    cosine = np.where(np.arange(pairs) < HARD_SHARE * pairs, HARD, EASY)
    x[b] = beside(x[a], rng.standard_normal((pairs, dim)), cosine)
    return x, a, b


def beside(x: np.ndarray, noise: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return rows at given cosines from unit rows, each in the direction of its noise."""
    across = unit(noise - np.einsum("ij,ij->i", noise, x)[:, None] * x)
    return cosine[:, None] * x + np.sqrt(1 - cosine[:, None] ** 2) * across


if __name__ == "__main__":
    main()
