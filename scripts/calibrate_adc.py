"""The adaptive ADC threshold on real features: recall at given precisions, and the constants.

    python scripts/calibrate_adc.py --features FOLDER [--dim 128 | --encoder DIR] [--json FILE]
    python scripts/calibrate_adc.py --features FOLDER --train_shards 8 [--encoder DIR]

A row is truly duplicated if any other row has a cosine of at least .95; it is flagged if its best
neighbour in the index (with another row number) passes. The rules are one global limit on the ADC
distance, ratio and difference of it and the row's own error, the mean of both rows' differences,
the two-sided rule, and, for an index without features, a limit on the distance between codes. The
margins printed are the defaults of `snipdedup.adc.threshold`.

With --train_shards N, directions, quantisers and margins come from the first N shards only (give an
encoder that was trained on those, --parts of snip train), all rows are indexed, and the rows of
the other shards are judged: what a margin is worth on rows that it was not chosen on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import config
from snipdedup.adc import two_sided
from snipdedup.adc.threshold import SYMMETRIC, TWO_SIDED, calibrate, scores, true_duplicates
from snipdedup.features.cosine import unit_rows
from snipdedup.features.formats import ArrayShard
from snipdedup.features.shards import Features, open_features, plan_blocks
from snipdedup.index.build import build
from snipdedup.index.search import QUERY_ROWS, LoadedIndex
from snipdedup.parallel import cores, ordered_map
from snipdedup.statistics import proportion_interval

BOTH = "both ways"  # the two-sided rule without what common codes tell
RULES = ("global", "ratio", "difference", BOTH, TWO_SIDED, SYMMETRIC)
PRECISIONS = (0.81, 0.91, 0.95)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    features = open_features(given.features)
    known = train_rows(features, given.train_shards)
    rng = np.random.default_rng(given.seed)
    count = min(given.sample, features.rows)
    sample = np.sort(rng.choice(features.rows, count, replace=False))
    truth = true_duplicates(features, sample, given.threshold, cores())
    results = []
    for m in given.code_bytes:
        vectors = describe(features, given, known, m)
        results += measure(vectors, sample, truth, m, given, known)
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
    parser.add_argument("--encoder", help="descriptors of this encoder in place of PCA's")
    parser.add_argument("--train_shards", type=int, help="shards that anything is learnt from")
    parser.add_argument("--code_bytes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--nlist", type=int, default=512)
    parser.add_argument("--nprobe", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--sample", type=int, default=16_384, help="rows judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args(argv)


def train_rows(features: Features, shards: int | None) -> int:
    """Return how many rows anything is learnt from: those of the first shards, or all."""
    return int(features.offsets[len(features.shards) if shards is None else shards])


def describe(features: Features, given: argparse.Namespace, known: int, m: int) -> np.ndarray:
    """Return all rows as they are indexed, (n, d) float32: descriptors, or main directions.

    Codes of few bytes take the encoder's head, as in ``snip index``.
    """
    if given.encoder:
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(given.encoder, device="cpu").for_codes(m)
        return np.concatenate(
            [encoder.encode(block, first) for first, block in features.blocks(8192)]
        )
    rows = np.concatenate([unit_rows(block) for _, block in features.blocks(65_536)])
    if given.dim:  # principal directions about 0
        _, directions = np.linalg.eigh(rows[:known].T @ rows[:known])
        rows = rows @ directions[:, ::-1][:, : given.dim]
    return np.ascontiguousarray(rows)


def in_memory(vectors: np.ndarray) -> Features:
    """Return vectors as features."""
    return Features([ArrayShard(vectors, "vectors")])


def load_index(vectors: np.ndarray, known: int, m: int, given: argparse.Namespace) -> LoadedIndex:
    """Return an index of all vectors whose quantisers come from the first ``known``."""
    options = {"m": m, "nlist": given.nlist, "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "known"
        settled = config.BuildIndex(features=None, out=str(base), **options)
        index = build(in_memory(vectors[:known]), base, settled, as_stored=True)
        if known < len(vectors):
            out = Path(folder) / "all"
            settled = config.BuildIndex(features=None, out=str(out), base=str(base))
            index = build(in_memory(vectors), out, settled, as_stored=True)
        return LoadedIndex(index, in_memory(vectors), given.nprobe)


def measure(
    vectors: np.ndarray,
    sample: np.ndarray,
    truth: np.ndarray,
    m: int,
    given: argparse.Namespace,
    known: int,
) -> list[dict[str, Any]]:
    """Return margin, precision and recall of each rule at each precision, for one code size."""
    loaded = load_index(vectors, known, m, given)
    chosen_on = sample < known
    results = []
    with tempfile.TemporaryDirectory() as folder:
        views = two_sided.record_views(loaded, given.k, Path(folder), cores())
        seen = {
            rule: two_sided.best_view_scores(
                views, sample, cores(), common=float(rule == TWO_SIDED)
            )
            for rule in (BOTH, TWO_SIDED)
        }
    for rule in RULES:
        best = seen.get(rule)
        if best is None:
            best = rule_scores(loaded, sample, rule, given.k)
        for precision in PRECISIONS:
            margin, reached = calibrate(best[chosen_on], truth[chosen_on], precision)
            results.append(
                {
                    "code_bytes": m,
                    "rule": rule,
                    "wanted": precision,
                    "margin": margin,
                    "mean_self_adc": loaded.index.manifest["mean_self_adc"],
                    **reached,
                    "others": judged(best[~chosen_on], truth[~chosen_on], margin, precision),
                }
            )
    return results


def judged(
    best: np.ndarray, truth: np.ndarray, margin: float, precision: float
) -> dict[str, Any] | None:
    """Return what a margin does on rows that it was not chosen on; None where there are none.

    ``recall_at`` is the recall there at the wanted precision, by the margin that would suit them.
    """
    if not len(best):
        return None
    flags = best <= margin
    right, flagged = int(truth[flags].sum()), int(flags.sum())
    own = calibrate(best, truth, precision)[1]
    return {
        "rows": len(best),
        "duplicates": int(truth.sum()),
        "precision": right / max(flagged, 1),
        "precision_interval": list(proportion_interval(right, flagged)),
        "recall": right / max(int(truth.sum()), 1),
        "recall_at": own["recall"] if own["reached"] else 0.0,
    }


def rule_scores(loaded: LoadedIndex, sample: np.ndarray, rule: str, k: int) -> np.ndarray:
    """Return the best score of each sampled row by one rule, (n,) float32."""
    searcher, quantiser = loaded.searcher, loaded.index.quantiser

    def best(span: tuple[int, int]) -> np.ndarray:
        rows, x, own = loaded.queries(span, sample)[1:]
        if rule == SYMMETRIC:
            lists = quantiser.assign(x, 1)[1][:, 0]
            x = quantiser.decode(lists, quantiser.encode(x, lists))
        if rule in (SYMMETRIC, "global"):
            own = np.zeros_like(own)
        D, I = searcher.places(x, *searcher.probe(x, span[0]), k)
        score = scores(D, own, "ratio" if rule == "ratio" else "difference")
        # Rows of one code are one entry: it is a neighbour of each of them.
        score[(loaded.class_of[rows, None] == I) & ~loaded.shared[rows][:, None]] = np.inf
        return np.asarray(score.min(axis=1))

    spans = plan_blocks(len(sample), QUERY_ROWS)
    return np.concatenate(list(ordered_map(best, spans, cores())))


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
        *grid(results, sizes, "recall", margins=True),
    ]
    if given.train_shards is not None:
        others = [{**r, **r["others"]} for r in results]
        lines += ["", "on the other shards, by these margins: recall (precision)", ""]
        lines += grid(others, sizes, "recall", margins=False)
        lines += ["", "on the other shards, at the wanted precision there: recall", ""]
        lines += grid(others, sizes, "recall_at", margins=None)
    return "\n".join(lines)


def grid(
    results: list[dict[str, Any]], sizes: list[int], name: str, *, margins: bool | None
) -> list[str]:
    """Return rules by code sizes; in brackets margins, else precisions, or nothing for None."""
    lines = [
        "| rule | " + " | ".join(f"{size} B" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for rule in RULES:
        cells = []
        for size in sizes:
            of = [r for r in results if r["rule"] == rule and r["code_bytes"] == size]
            cell = " / ".join(f"{r[name]:.2f}" if r["reached"] else "-" for r in of)
            if margins is not None:
                what = "margin" if margins else "precision"
                digits = ".4f" if margins else ".2f"
                cell += f" ({', '.join(format(r[what], digits) for r in of)})"
            cells.append(cell)
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
