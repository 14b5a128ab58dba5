"""Do short descriptors still tell which rows show the same picture? On features with labels.

    python scripts/bench_labels.py --features features.npy --labels labels.parquet

Average precision over all pairs of rows, a pair being right if both have one label. Pictures are
cut in two halves: encoders and PCA learn from the rows of one (without labels), pairs of the other
are judged, then the other way round. Labels are read as `snip threshold --same` reads them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.encoder.network import principal_directions
from snipdedup.encoder.training import train_encoder
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import open_features
from snipdedup.index.kmeans import Vectors
from snipdedup.inspection.threshold import read_labels
from snipdedup.statistics import average_precision

NAMES = ("raw", "PCA", "MSE", "SNIP")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    features = open_features(given.features)
    rows = np.arange(features.rows)
    labels = read_labels(given.labels, given.group, given.features, features, rows)
    rows = features.read(0, features.rows)
    half = np.random.default_rng(given.seed).permutation(labels.max() + 1)[labels] % 2
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in (0, 1):
        judged = half == number
        for name, vectors in contenders(rows[~judged], given).items():
            found[name].append(pair_precision(vectors(rows[judged]), labels[judged]))
    body = summarise(found)
    print("\n".join(table(body)))
    if given.out:
        given.out.write_text(json.dumps({"kind": "labels", "results": body}, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="as snip dedup takes them")
    parser.add_argument("--labels", required=True, help="parquet or CSV, row for row")
    parser.add_argument("--group", default="group", help="column that says which picture it is")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, help="training steps (the default of snip train)")
    parser.add_argument("--temperature", type=float, help="of the snip loss (as snip train)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def contenders(rows: np.ndarray, given: argparse.Namespace) -> dict[str, Vectors]:
    """Return how each contender makes vectors, learnt from these rows."""
    settings = {"dim": given.dim, "seed": given.seed}
    settings |= {"steps": given.steps} if given.steps else {}
    directions = principal_directions(rows, given.dim).numpy()

    def pca(block: np.ndarray) -> np.ndarray:
        return unit_rows(unit_rows(block) @ directions.T)

    mse = train_encoder(rows, loss="mse", **settings)[0]
    settings |= {"temperature": given.temperature} if given.temperature else {}
    snip = train_encoder(rows, loss="snip", **settings)[0]
    return dict(zip(NAMES, (unit_rows, pca, mse.encode, snip.encode), strict=True))


def pair_precision(x: np.ndarray, labels: np.ndarray) -> float:
    """Return the average precision over all pairs of rows, by dot product."""
    a, b = np.triu_indices(len(x), 1)
    similarity = (x @ x.T)[a, b]
    return average_precision(similarity, labels[a] == labels[b])


def summarise(found: dict[str, list[float]]) -> dict[str, Any]:
    """Return the mean over both halves, and the share of the raw features' figure."""
    raw = float(np.mean(found["raw"]))
    return {
        name: {
            "halves": [round(value, 4) for value in values],
            "average_precision": round(float(np.mean(values)), 4),
            "kept": round(float(np.mean(values)) / raw, 4),
        }
        for name, values in found.items()
    }


def table(body: dict[str, Any]) -> list[str]:
    """Return the result as Markdown."""
    lines = ["| | average precision | halves | of raw |", "|---|---:|---:|---:|"]
    for name, e in body.items():
        halves = " / ".join(f"{value:.3f}" for value in e["halves"])
        lines.append(f"| {name} | {e['average_precision']:.3f} | {halves} | {e['kept']:.3f} |")
    return lines


if __name__ == "__main__":
    main()
