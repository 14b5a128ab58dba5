"""Which threshold fits a model: precision, recall and F1 by threshold, on features with labels.

    python scripts/labelled_curve.py --features features.npy --labels labels.parquet

The labels are a table beside the features, row for row; two rows with the same value in its column
``group`` (--group names another) show the same picture. Every pair of rows is judged, by brute
force. ``removed`` and ``right`` are what ``snip dedup`` would do at that threshold (star, keep
first): rows that go, and the share of them whose representative shows the same picture; ``left`` is
rows that stay beside another row of the same picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import snipdedup
from snipdedup.features.cosine import unit_rows64
from snipdedup.features.shards import Features, open_features, plan_blocks
from snipdedup.metadata.tables import open_metadata

THRESHOLDS = (0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
GRID = np.arange(1, 1001) / 1000  # where the best F1 is looked for
BLOCK = 512  # rows compared with all others at a time


class Curve(NamedTuple):
    """How pairs at or above each threshold do.

    Attributes
    ----------
    threshold : (n,) float64
    precision, recall, f1 : (n,) float64
    """

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    features = open_features(given.features)
    labels = read_labels(given.labels, given.group, features)
    print(f"{features.rows:,} rows, {features.dim} wide, {len(np.unique(labels)):,} pictures\n")
    curve = pair_curve(features, labels, np.union1d(GRID, given.thresholds))
    print("\n".join(table(features, labels, curve, np.sort(given.thresholds))))
    best = int(np.argmax(curve.f1))
    print(f"\nbest F1 over pairs: {curve.f1[best]:.3f} at {curve.threshold[best]:.3f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="as snip dedup takes them")
    parser.add_argument("--labels", required=True, help="parquet or CSV, row for row")
    parser.add_argument("--group", default="group", help="column that says which picture it is")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    return parser.parse_args(argv)


def read_labels(path: str, column: str, features: Features) -> np.ndarray:
    """Return a number for each row, the same for rows of one label: (rows,) int64."""
    metadata = open_metadata(path)
    metadata.check_matches(features.describe())
    texts = metadata.take(metadata.column(column) or column, np.arange(features.rows))
    return np.unique(texts.to_numpy().astype(str), return_inverse=True)[1].astype(np.int64)


def pair_curve(features: Features, labels: np.ndarray, thresholds: np.ndarray) -> Curve:
    """Judge all pairs of rows at each threshold.

    Parameters
    ----------
    features : Features
        Held in memory as float64.
    labels : (rows,) int64
    thresholds : (n,) float64
        Ascending.
    """
    unit = unit_rows64(features.read(0, features.rows))
    limits = np.asarray(thresholds, np.float32)
    found, true = (np.zeros(len(limits) + 1, np.int64) for _ in range(2))
    for start, stop in plan_blocks(features.rows, BLOCK):
        cosine = (unit[start:stop] @ unit[start:].T).astype(np.float32)
        later = np.arange(start, features.rows) > np.arange(start, stop)[:, None]
        same = labels[start:stop, None] == labels[start:]
        reached = np.searchsorted(limits, cosine, side="right")  # how many thresholds it reaches
        found += np.bincount(reached[later], minlength=len(found))
        true += np.bincount(reached[later & same], minlength=len(true))
    flagged, right = (counts[::-1].cumsum()[::-1][1:] for counts in (found, true))
    precision = right / np.maximum(flagged, 1)
    recall = right / max(int(true.sum()), 1)
    f1 = 2 * right / np.maximum(flagged + int(true.sum()), 1)
    return Curve(np.asarray(thresholds), precision, recall, f1)


def table(
    features: Features, labels: np.ndarray, curve: Curve, thresholds: np.ndarray
) -> list[str]:
    """Return the curve as Markdown, with what a de-duplication at each threshold does."""
    at = np.searchsorted(curve.threshold, thresholds)
    result = snipdedup.dedup(features, method="exact", threshold=float(thresholds[0]))
    lines = [
        "| threshold | precision | recall | F1 | removed | right | left |",
        "|---|---|---|---|---|---|---|",
    ]
    for threshold, precision, recall, f1 in zip(*(column[at] for column in curve), strict=True):
        removed, right, left = decided(result.at(float(threshold)), labels)
        lines.append(
            f"| {threshold:.2f} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {removed:,} | "
            f"{right:.3f} | {left:,} |"
        )
    return lines


def decided(result: snipdedup.Result, labels: np.ndarray) -> tuple[int, float, int]:
    """Return rows removed, the share that is right, and rows left beside one of their picture."""
    gone = result.members.is_dup
    row, representative = result.members.row[gone], result.members.representative[gone]
    right = float((labels[row] == labels[representative]).mean()) if len(row) else 1.0
    staying = np.bincount(labels[~result.is_dup], minlength=int(labels.max()) + 1)
    return len(row), right, int(np.maximum(staying - 1, 0).sum())


if __name__ == "__main__":
    main()
