"""The adaptive ADC threshold on real features: recall at given precisions, and the constants.

    python scripts/calibrate_adc.py --features FOLDER [--dim 128] [--json FILE]

A row is truly duplicated if any other row has a cosine of at least .95; it is flagged if its best
neighbour in the index (with another row number) passes. The rules are one global limit on the ADC
distance, ratio and difference of it and the row's own error, and, for an index without features,
a limit on the distance between codes. The margins printed are the defaults of `snipdedup.adaptive`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import settings
from snipdedup.adaptive import SYMMETRIC, calibrate, scores, true_duplicates
from snipdedup.classes import classes_of
from snipdedup.compute import cores
from snipdedup.cosine import unit_rows
from snipdedup.formats import ArrayShard
from snipdedup.index import build
from snipdedup.indexfolder import Index
from snipdedup.search import Searcher, feature_queries, neighbours
from snipdedup.shards import Features, open_features

RULES = ("global", "ratio", "difference", SYMMETRIC)
PRECISIONS = (0.81, 0.91, 0.95)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    features = open_features(given.features)
    rng = np.random.default_rng(given.seed)
    count = min(given.sample, features.rows)
    sample = np.sort(rng.choice(features.rows, count, replace=False))
    truth = true_duplicates(features, sample, given.threshold, cores())
    vectors = project(features, given.dim)
    results = [
        result
        for code_bytes in given.code_bytes
        for result in measure(vectors, sample, truth, code_bytes, given)
    ]
    print(table(results, features, truth, given))
    if given.json:
        body = {
            "settings": {**vars(given), "json": None},
            "rows": features.rows,
            "judged": len(truth),
            "duplicates": int(truth.sum()),
            "results": results,
        }
        Path(given.json).write_text(json.dumps(body, indent=2, default=str) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--dim", type=int, default=128, help="width after PCA; 0: rows as they are")
    parser.add_argument("--code_bytes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--nlist", type=int, default=512)
    parser.add_argument("--nprobe", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--sample", type=int, default=16_384, help="rows judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args(argv)


def project(features: Features, dim: int) -> Features:
    """Return unit rows on their first principal directions (about 0), in memory."""
    rows = np.concatenate([unit_rows(block) for _, block in features.blocks(65_536)])
    if dim:
        _, directions = np.linalg.eigh(rows.T @ rows)
        rows = rows @ directions[:, ::-1][:, :dim]
    return Features([ArrayShard(np.ascontiguousarray(rows), "projected")])


def measure(
    vectors: Features, sample: np.ndarray, truth: np.ndarray, m: int, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return margin, precision and recall of each rule at each precision, for one code size."""
    with tempfile.TemporaryDirectory() as folder:
        options = settings.Index(features=None, out=folder, m=m, nlist=given.nlist, seed=given.seed)
        index, _ = build(vectors, Path(folder), options, as_stored=True)
        classes = classes_of(index.lists())
    shared = classes.shared(index.rows)
    searcher = Searcher(index, classes.lists, given.nprobe)
    results = []
    for rule in RULES:
        best = rule_scores(index, searcher, vectors, sample, shared, rule, given.k)
        for precision in PRECISIONS:
            margin, reached = calibrate(best, truth, precision)
            results.append(
                {
                    "code_bytes": m,
                    "rule": rule,
                    "wanted": precision,
                    "margin": margin,
                    "mean_self_adc": index.manifest["mean_self_adc"],
                    **reached,
                }
            )
    return results


def rule_scores(
    index: Index,
    searcher: Searcher,
    vectors: Features,
    sample: np.ndarray,
    shared: np.ndarray,
    rule: str,
    k: int,
) -> np.ndarray:
    """Return the best score of each sampled row by one rule, (n,) float32."""
    source = feature_queries(index, index.space, vectors, sample)
    if rule == SYMMETRIC:
        known = source.load

        def load(span: tuple[int, int]) -> Any:
            queries = known(span)
            lists = index.quantiser.assign(queries.x, 1)[1][:, 0]
            x = index.quantiser.decode(lists, index.quantiser.encode(queries.x, lists))
            return queries._replace(x=x, own=np.zeros_like(queries.own))

        source = source._replace(load=load)
    parts = []
    for queries, D, I in neighbours(searcher, source, k=k, threads=cores()):
        own = np.zeros_like(queries.own) if rule == "global" else queries.own
        score = scores(D, own, "ratio" if rule == "ratio" else "difference")
        # Rows of one code are one entry: it is a neighbour even if it bears the row's own number.
        score[(queries.rows[:, None] == I) & ~shared[queries.rows][:, None]] = np.inf
        parts.append(score.min(axis=1))
    return np.concatenate(parts)


def table(
    results: list[dict[str, Any]], features: Features, truth: np.ndarray, given: argparse.Namespace
) -> str:
    """Return the results as Markdown: recall, and the margin in brackets."""
    sizes = given.code_bytes
    lines = [
        f"{features.rows:,} rows, {len(truth):,} judged, {int(truth.sum()):,} truly duplicated at "
        f"cosine {given.threshold}; recall at precision {' / '.join(map(str, PRECISIONS))} "
        "(margins)",
        "",
        "| rule | " + " | ".join(f"{size} B" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for rule in RULES:
        cells = []
        for size in sizes:
            of = [r for r in results if r["rule"] == rule and r["code_bytes"] == size]
            recall = " / ".join(f"{r['recall']:.2f}" if r["reached"] else "-" for r in of)
            cells.append(f"{recall} ({', '.join(format(r['margin'], '.4f') for r in of)})")
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
