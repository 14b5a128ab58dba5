"""The adaptive threshold: which neighbours count as duplicates, and its constant, the margin.

A code is wrong by about as much for a row as for its near-duplicate, so the distance of x to
another row's code is judged by x's distance to its own (`scores`; arXiv:2303.12733).

Without features the rows themselves are unknown: q(x) stands for x. Its own error is then 0 by
construction, and what is compared with a constant is ‖q(x) − q(y)‖² (rule ``symmetric``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from snipdedup import native, progress
from snipdedup.features.cosine import bad_rows, indexed_cosines, integer_rows, unit_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.search import QUERY_ROWS, LoadedIndex
from snipdedup.join.projection import encode_rows, main_directions, project
from snipdedup.parallel import ordered_map
from snipdedup.statistics import proportion_interval

LEAST_ERROR = 1e-12  # a self distance below is taken for this: rows may equal their code
SYMMETRIC = "symmetric"  # the rule of an index without features
TWO_SIDED = "two_sided"  # the rule of the module of that name
CODE_WIDTHS = (64, 128)  # of codes that rule out most pairs before cosines decide
DIRECTION_ROWS = 1 << 12  # sampled rows whose main directions these codes keep
COMPARED_ROWS = 4096  # rows compared with the sampled ones at a time

# Margins at precision .81, .91, .95 by rule and bytes a code: 58,977 CLIP ViT-B/32 features of key
# frames, a third of them duplicated at cosine .95, IVF512, nprobe 4. ROWS: as 128 main directions,
#   python scripts/calibrate_adc.py --features keyframes/img_emb --code_bytes 4 8 16 32
# DESCRIPTORS: of an encoder trained on the first 8 of 12 shards, of which the margins are (codes of
# up to 8 bytes of its head of 32 dimensions, of 16 bytes of that of 64, as in ``snip index``),
#   python scripts/calibrate_adc.py --features keyframes/img_emb --encoder encoder --train_shards 8
#     --sample 60000
# What transfers is the code size: 512-d rows as they are want margins about a quarter smaller at 8
# and 16 bytes, though their codes' mean error is two to three times as large. A set with fewer
# duplicates gets less precision from the same margin. With 4 bytes no margin of ``difference``
# reaches .95 on rows: 0 flags shared codes only.
DEFAULT_THRESHOLD, DEFAULT_PRECISIONS = 0.95, (0.81, 0.91, 0.95)
ROWS = {
    "two_sided": {
        4: (0.0529, 0.0368, 0.0304), 8: (0.0916, 0.0709, 0.0603),
        16: (0.1483, 0.1188, 0.1055), 32: (0.2193, 0.1836, 0.1662),
    },
    "difference": {
        4: (0.0076, 0.0030, 0.0), 8: (0.0235, 0.0168, 0.0134),
        16: (0.0433, 0.0354, 0.0310), 32: (0.0599, 0.0506, 0.0464),
    },
    "ratio": {
        4: (1.067, 1.019, 1.0), 8: (1.273, 1.163, 1.111),
        16: (1.899, 1.604, 1.469), 32: (5.210, 3.960, 3.427),
    },
    "symmetric": {
        4: (0.0194, 0.0125, 0.0073), 8: (0.0489, 0.0384, 0.0332),
        16: (0.0734, 0.0614, 0.0558), 32: (0.0748, 0.0635, 0.0582),
    },
}  # fmt: skip
DESCRIPTORS = {
    "two_sided": {
        4: (0.0590, 0.0418, 0.0341), 8: (0.0852, 0.0656, 0.0560),
        16: (0.1667, 0.1390, 0.1245),
    },
    "difference": {
        4: (0.0185, 0.0112, 0.0073), 8: (0.0339, 0.0259, 0.0218),
        16: (0.0562, 0.0477, 0.0432),
    },
    "ratio": {
        4: (1.431, 1.228, 1.140), 8: (3.817, 2.828, 2.344),
        16: (4.669, 3.475, 2.957),
    },
    "symmetric": {
        4: (0.0350, 0.0250, 0.0192), 8: (0.0422, 0.0337, 0.0289),
        16: (0.0686, 0.0590, 0.0542),
    },
}  # fmt: skip


def scores(D: np.ndarray, own: np.ndarray, rule: str) -> np.ndarray:
    """Return what the rule compares with its margin, (n, k) float32; at most that passes.

    ``D`` (n, k) are ADC distances to neighbours, ``own`` (n,) those to the rows' own codes, zeros
    for ``symmetric``. ``difference`` and ``symmetric``: D − own; ``ratio``: D / own.
    """
    if rule == "ratio":
        return D / np.maximum(own, LEAST_ERROR)[:, None]
    return D - own[:, None]


def default_margin(
    rule: str, code_size: int, *, precision: float, threshold: float, encoded: bool
) -> float:
    """Return the margin for an index whose rows cannot be sampled, from the tables above.

    ``encoded`` says that the codes are of an encoder's descriptors.

    Between the code sizes and precisions of the table it is interpolated, beyond them the nearest
    is taken. It grows with the squared distance that the threshold allows, 2 − 2t: a code's error
    cancels out in the rule, the distance of a pair does not.
    """
    table = (DESCRIPTORS if encoded else ROWS)[rule]
    sizes = np.log2(list(table))
    by_size = [np.interp(precision, DEFAULT_PRECISIONS, margins) for margins in table.values()]
    margin = float(np.interp(np.log2(code_size), sizes, by_size))
    scale = max(1 - threshold, 0) / (1 - DEFAULT_THRESHOLD)
    same = float(rule == "ratio")  # the score of an exact match
    return same + (margin - same) * scale


def true_duplicates(
    features: Features, sample: np.ndarray, threshold: float, threads: int
) -> np.ndarray:
    """Return which sampled rows have another row at or above the threshold, (n,) bool.

    By brute force: all rows pass by the sampled ones. Products of short codes, then of wider ones,
    rule out what the bounds of `join.projection` rule out; cosines decide.
    """
    raw = features.gather(sample)
    found, open_ = np.zeros(len(sample), bool), ~bad_rows(raw)
    first = raw[open_][:DIRECTION_ROWS]
    if not len(first):
        return found
    main = main_directions(unit_rows(first), CODE_WIDTHS[-1] - 1, threads)
    whole = integer_rows(first)[0]
    both = [project(main, whole, width, 0)[0] for width in CODE_WIDTHS]
    narrow, wide = (encode_rows(projection, raw, threads) for projection in both)
    limit, wide_limit = (projection.limit(threshold) for projection in both)

    def compare(span: tuple[int, int]) -> None:
        block = features.read(*span)
        whole, bad = integer_rows(block)
        x, y = (projection.encode_block(block, whole) for projection in both)
        ask = np.flatnonzero(open_ & ~found)
        limits = wide.values[ask], wide_limit - wide.falls[ask]
        columns = native.columns(*x)
        i, j = native.hits(narrow.values[ask], columns, limit - narrow.falls[ask], (*limits, *y))
        i, j = ask[i], j.astype(np.int64)
        use = (sample[i] != span[0] + j) & ~bad[j]
        i, j = i[use], j[use]
        found[i[indexed_cosines(raw, block, i, j) >= np.float32(threshold)]] = True

    spans = plan_blocks(features.rows, COMPARED_ROWS)
    done = ordered_map(compare, spans, threads)
    for _ in progress.track(done, "comparing", "blocks", len(spans)):
        pass
    return found


def best_scores(loaded: LoadedIndex, sample: np.ndarray, rule: str, threads: int) -> np.ndarray:
    """Return each sampled row's best score among other rows, (n,) float32; infinity for none.

    Rows that share a code with another have the score of an exact match.
    """
    searcher, shared = loaded.searcher, loaded.shared

    def search(span: tuple[int, int]) -> np.ndarray:
        queries = loaded.queries(span, sample)
        # Two places are enough: rows that share a code are one entry, so the row itself takes one.
        D, I = searcher.places(queries.x, *searcher.probe(queries.x, queries.first), 2)
        score = scores(D, queries.own, rule)
        score[(I < 0) | (loaded.class_of[queries.rows, None] == I)] = np.inf
        best = score.min(axis=1)
        best[shared[queries.rows]] = np.float32(rule == "ratio")
        return np.where(queries.rows >= 0, best, np.inf).astype(np.float32)

    return np.concatenate(list(ordered_map(search, plan_blocks(len(sample), QUERY_ROWS), threads)))


def calibrate(
    best: np.ndarray, truth: np.ndarray, precision: float
) -> tuple[float, dict[str, Any]]:
    """Return the margin with the highest recall at a wanted precision, and what it reaches.

    Where no margin reaches the precision, the most precise one is taken (``reached`` is false).
    ``best`` (n,) are the rows' best scores, ``truth`` (n,) which are duplicates. The margin is
    chosen on the same sample, so a small one flatters: the interval of the precision knows nothing
    of the choice.
    """
    score, right, flagged = flag_curve(best, truth)
    reached = {"source": "sample", "rows": len(best), "duplicates": int(truth.sum())}
    if not len(score):
        nothing = {"precision": None, "precision_interval": [0.0, 1.0], "recall": 0.0}
        return 0.0, {**reached, "flagged": 0, **nothing, "reached": False}
    at, good = choose_margin(right / flagged, precision)
    return float(score[at]), {
        **reached,
        "flagged": int(flagged[at]),
        "precision": float(right[at] / flagged[at]),
        "precision_interval": list(proportion_interval(int(right[at]), int(flagged[at]))),
        "recall": float(right[at] / max(truth.sum(), 1)),
        "reached": good,
    }


def flag_curve(best: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each margin that tells rows apart, ascending, and right and all flags at it."""
    order = np.argsort(best, kind="stable")
    score, right = best[order], np.cumsum(truth[order])
    ends = np.append(score[1:] != score[:-1], True) & np.isfinite(score)
    return score[ends], right[ends], np.flatnonzero(ends) + 1


def choose_margin(reached: np.ndarray, precision: float) -> tuple[int, bool]:
    """Return the last place with a precision as wanted, else the most precise; and which it is."""
    good = np.flatnonzero(reached >= precision)
    return (int(good[-1]), True) if len(good) else (int(np.argmax(reached)), False)
