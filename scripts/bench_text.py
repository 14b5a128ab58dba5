"""How texts find their images after compression, cross-validated over items.

    python scripts/bench_text.py --images IMAGES.npy --texts TEXTS.npy [--items FILE.csv:COLUMN]

Items are cut into folds; encoders and PCA learn from the images and texts of all folds but one, and
texts of that one look for their image among all images, images for a text of theirs among all. A
tie counts half. 95 % intervals over items (Clopper-Pearson).
"""

from __future__ import annotations

import argparse
import csv
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
from snipdedup.statistics import partner_ranks, proportion_interval

NAMES = ("raw", "PCA of images", "PCA", "MSE", "SNIP without texts", "SNIP")
KS = (1, 10)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    images, texts = (read(path) for path in (given.images, given.texts))
    item = read_items(given.items, len(images))
    ranks = cross_validate(images, texts, item, given)
    body = summarise(ranks, item)
    print(f"{len(images):,} pairs of {len(np.unique(item)):,} items, {given.folds} folds\n")
    print("\n".join(table(body)))
    if given.out:
        held = json.loads(given.out.read_text()) if given.out.is_file() else {"kind": "text"}
        held[given.name or given.images.parent.name] = {"pairs": len(images), "results": body}
        given.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="row for row")
    parser.add_argument("--items", help="FILE.csv:COLUMN, where several rows are of one item")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the set in the JSON (the folder of --images)")
    parser.add_argument("--out", type=Path, help="JSON file to add the result to")
    return parser.parse_args(argv)


def read(path: Path) -> np.ndarray:
    """Return all rows of features."""
    features = open_features(path)
    return features.read(0, features.rows)


def read_items(named: str | None, rows: int) -> np.ndarray:
    """Return a number for each row, the same for rows of one item."""
    if named is None:
        return np.arange(rows)
    path, _, column = named.rpartition(":")
    with Path(path).open(newline="", encoding="utf-8") as file:
        values = [row[column] for row in csv.DictReader(file)]
    return np.unique(values, return_inverse=True)[1]


def cross_validate(
    images: np.ndarray, texts: np.ndarray, item: np.ndarray, given: argparse.Namespace
) -> dict[tuple[str, str], np.ndarray]:
    """Return the rank of each row's partner, by contender and direction."""
    order = np.random.default_rng(given.seed).permutation(item.max() + 1)
    fold = (np.arange(len(order)) % given.folds)[np.argsort(order)][item]
    shown = np.unique(item, return_index=True)[1]  # each picture once, whatever its captions
    ranks = {(name, way): np.zeros(len(images)) for name in NAMES for way in ("text", "image")}
    for number in range(given.folds):
        held = np.flatnonzero(fold == number)
        seen = fold != number
        for name, vectors in contenders(images[seen], texts[seen], given).items():
            x, t = vectors(images), vectors(texts)
            near = t[held] @ x[shown].T
            ranks[name, "text"][held] = partner_ranks(near, item[held], item[shown])
            ranks[name, "image"][held] = partner_ranks(x[held] @ t.T, item[held], item)
    return ranks


def contenders(
    images: np.ndarray, texts: np.ndarray, given: argparse.Namespace
) -> dict[str, Vectors]:
    """Return how each contender makes vectors, learnt from these rows."""
    settings = {"dim": given.dim, "steps": given.steps, "seed": given.seed}

    def pca(beside: np.ndarray | None) -> Vectors:
        directions = principal_directions(images, given.dim, beside).numpy()
        return lambda rows: unit_rows(unit_rows(rows) @ directions.T)

    def learnt(loss: str, beside: np.ndarray | None) -> Vectors:
        return train_encoder(images, text_features=beside, loss=loss, **settings)[0].encode

    made = (unit_rows, pca(None), pca(texts), learnt("mse", texts), learnt("snip", None),
            learnt("snip", texts))  # fmt: skip
    return dict(zip(NAMES, made, strict=True))


def summarise(ranks: dict[tuple[str, str], np.ndarray], item: np.ndarray) -> list[dict[str, Any]]:
    """Return recall at each k, its interval, and the share of the raw features' recall kept."""
    items = len(np.unique(item))
    found = []
    for (name, way), rank in ranks.items():
        entry: dict[str, Any] = {"contender": name, "query": way}
        for k in KS:
            recall = float((rank < k).mean())
            # Rows of one item are no independent trials: as many trials as there are items.
            low, high = proportion_interval(round(recall * items), items)
            raw = float((ranks["raw", way] < k).mean())
            entry[str(k)] = {"recall": round(recall, 4), "low": round(low, 4),
                             "high": round(high, 4), "kept": round(recall / raw, 4)}  # fmt: skip
        found.append(entry)
    return found


def table(body: list[dict[str, Any]]) -> list[str]:
    """Return the result as Markdown."""
    lines = ["| | query | recall@1 | kept | recall@10 | kept |", "|---|---|---:|---:|---:|---:|"]
    for entry in body:
        cells = []
        for k in KS:
            e = entry[str(k)]
            cells += [f"{e['recall']:.3f} ({e['low']:.3f} – {e['high']:.3f})", f"{e['kept']:.1%}"]
        lines.append(f"| {entry['contender']} | {entry['query']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
