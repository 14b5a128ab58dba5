"""Recall of short descriptors and codes on rows that no encoder saw, beside PCA, MSE and OPQ.

    python scripts/bench_codes.py --features FOLDER --out FILE.json [--quick] [--seeds 0 1 2]

Encoders and PCA learn from two thirds of the rows; the rest are indexed (quantisers trained on
them) and all queried: recall@10 against exact cosine, the query itself left out; IVF256, nprobe 8.
``random``: a random third is kept back; ``shard``: every third shard, so other videos or sites. OPQ
turns the raw rows that are indexed (autofaiss's recipe). ``PCA head`` is PCA of half the width, as
one of the encoders' heads. A run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from make_benchmarks import CODE_NAMES, code_table
from timing import machine

from snipdedup.encoder.network import opq_rotation, principal_directions
from snipdedup.encoder.training import train_encoder
from snipdedup.evaluation.evaluate import IndexedRows, drop_own
from snipdedup.features.cosine import unit_rows
from snipdedup.features.nearest import nearest, nearest_vectors
from snipdedup.features.shards import Features, open_features
from snipdedup.index.kmeans import Vectors
from snipdedup.index.quantizer import train_quantiser
from snipdedup.parallel import cores
from snipdedup.statistics import recall

K, NLIST, NPROBE, OPQ_ROUNDS = 10, 256, 8, 20
QUICK = {"steps": 300}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not in the file yet, write it, print the table."""
    given = parse(argv)
    body = json.loads(given.out.read_text()) if given.out.is_file() else {"runs": []}
    features = open_features(given.features)
    done = {(run["split"], run["seed"], run["name"]) for run in body["runs"]}
    for split in given.splits:
        for seed in given.seeds:
            wanted = [name for name in given.names if (split, seed, name) not in done]
            if wanted:
                for run in measure(features, split, seed, wanted, given):
                    body["runs"].append(run)
                    write(body, features, given)
                    print(json.dumps(run), flush=True)
    write(body, features, given)
    print("\n".join(code_table(body)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or go on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", nargs="+", default=["random", "shard"])
    parser.add_argument("--names", nargs="+", default=list(CODE_NAMES), choices=CODE_NAMES)
    parser.add_argument("--code_bytes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, help="training steps (the default of snip train)")
    parser.add_argument("--quick", action="store_true", help="300 training steps")
    return parser.parse_args(argv)


def write(body: dict[str, Any], features: Features, given: argparse.Namespace) -> None:
    """Write everything measured so far."""
    body |= {
        "name": given.out.stem.replace("_", " "),
        "kind": "codes",
        "machine": machine(),
        "data": {"rows": features.rows, "dim": features.dim, "dtype": str(features.dtype)},
        "settings": {"dim": given.dim, "steps": given.steps, "quick": given.quick,
                     "nlist": NLIST, "nprobe": NPROBE, "k": K},
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def split_rows(features: Features, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to learn from and rows to index, ascending int64."""
    if split == "random":
        order = np.random.default_rng(seed).permutation(features.rows)
        cut = 2 * features.rows // 3
        return np.sort(order[:cut]), np.sort(order[cut:])
    shard = np.searchsorted(features.offsets, np.arange(features.rows), side="right") - 1
    held = shard % 3 == seed % 3
    return np.flatnonzero(~held), np.flatnonzero(held)


def measure(
    features: Features, split: str, seed: int, names: list[str], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield what one split gives, contender by contender."""
    learn, held = split_rows(features, split, seed)
    rows = features.gather(learn)
    indexed = open_features(features.gather(held))
    raw = indexed.read(0, indexed.rows)
    truth = nearest(raw, indexed, K, cores(), own=np.arange(indexed.rows))[1]
    for name in names:
        uncoded, coded, more = contender(name, rows, indexed, seed, given)
        found = {}
        if uncoded is not None:
            flat = nearest_among(uncoded(raw))
            found["uncoded"] = recall(flat, truth, K)
        for m in given.code_bytes:
            found[str(m)] = code_recall(coded(m)(raw), truth, m, seed)
        yield {
            "split": split,
            "seed": seed,
            "name": name,
            "recall": {key: round(value, 4) for key, value in found.items()},
            **more,
        }


def contender(
    name: str, rows: np.ndarray, indexed: Features, seed: int, given: argparse.Namespace
) -> tuple[Vectors | None, Callable[[int], Vectors], dict[str, Any]]:
    """Return how a contender makes vectors without codes and for a code, and what to note."""
    if name == "OPQ on raw":
        sample = unit_rows(indexed.read(0, indexed.rows))

        def turned(m: int) -> Vectors:
            rotation = opq_rotation(sample, m, OPQ_ROUNDS, 2 * OPQ_ROUNDS)
            return lambda block: unit_rows(block) @ rotation.T

        return None, turned, {}
    if name.startswith("PCA"):
        dim = given.dim // 2 if name == "PCA head" else given.dim
        directions = principal_directions(rows, dim).numpy()

        def pca(block: np.ndarray) -> np.ndarray:
            return unit_rows(unit_rows(block) @ directions.T)

        return pca, lambda m: pca, {"dim": dim}
    steps = QUICK if given.quick else {"steps": given.steps} if given.steps else {}
    loss = name.lower()
    encoder, history = train_encoder(rows, loss=loss, dim=given.dim, seed=seed, **steps)
    said = {"steps": history.steps, "validation_recall": history.best["recall"]}
    return encoder.encode, lambda m: encoder.for_codes(m).encode, said


def nearest_among(x: np.ndarray) -> np.ndarray:
    """Return the nearest other vectors of each, (n, K)."""

    def load(span: tuple[int, int]) -> np.ndarray:
        return x[slice(*span)]

    return nearest_vectors(x, load, len(x), K, cores(), own=np.arange(len(x)))[1]


def code_recall(x: np.ndarray, truth: np.ndarray, m: int, seed: int) -> float:
    """Return recall@10 of an IVFPQ of ``m`` bytes, trained on the vectors it holds."""
    quantiser = train_quantiser(x, nlist=NLIST, m=m, nbits=8, seed=seed, threads=cores())
    codes = IndexedRows(quantiser)
    codes.add(x)
    return recall(drop_own(codes.search(x, K + 1, NPROBE)[1], np.arange(len(x))), truth, K)


if __name__ == "__main__":
    main()
