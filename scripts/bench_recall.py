"""What lists and an encoder cost the join: recall and overlap against brute force, and seconds.

Small sets are one list, so that their join loses nothing. Here their rows are cut into lists all
the same, as many as a large set would have a row and more, at several thresholds; and an encoder,
if given, makes the codes.

usage: python scripts/bench_recall.py --features FOLDER [--encoder FOLDER] [--thresholds .95 .98]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import snipdedup
from snipdedup.search import fitting

HEADER = "| threshold | lists | recall | overlap | visits a row | candidates a row | seconds |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of one row for each threshold and number of lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--encoder", help="folder of a trained encoder")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.95, 0.98])
    parser.add_argument("--lists", type=int, nargs="*", default=[1, 146, 400])
    given = parser.parse_args(argv)
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
        mock.patch.object(fitting, "SINGLE_LIST_ROWS", single),
        mock.patch.object(fitting, "list_count", return_value=lists),
    ):
        start = time.perf_counter()
        found = snipdedup.dedup(features, threshold=threshold, **settings)
        seconds = time.perf_counter() - start
    recall = len(found.found.forest.a) / max(1, len(truth.found.forest.a))
    overlap = (found.is_dup & truth.is_dup).sum() / max(1, truth.is_dup.sum())
    rows, notes = len(found.is_dup), found.found.notes
    return (
        f"| {threshold} | {lists} | {recall:.5f} | {overlap:.5f} | {notes['visits'] / rows:.2f} | "
        f"{notes['candidates'] / rows:.1f} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    main()
