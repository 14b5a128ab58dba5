"""Proposed pairs are proved on the raw rows, read in row order; the others are dropped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snipdedup.compute import in_order
from snipdedup.cosine import pair_cosine
from snipdedup.forest import Edges, make_edges
from snipdedup.shards import Features, plan_blocks

VERIFY_PAIRS = 1024  # pairs whose rows are laid side by side at a time


def verify_pairs(
    features: Features, a: np.ndarray, b: np.ndarray, threshold: float, threads: int
) -> Iterator[Edges]:
    """Yield those of the proposed pairs that are pairs, each once, ordered by (a, b).

    Parameters
    ----------
    features : Features
    a, b : (n,) int64
        Rows; either may be the smaller, repeats are dropped.
    threshold : float
        Cosine from which two rows are a pair.
    threads : int
    """
    low, high = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((high, low))
    low, high = low[order], high[order]
    new = np.ones(len(low), bool)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    low, high = low[new], high[new]

    def check(span: tuple[int, int]) -> Edges:
        at = slice(*span)
        cosine = pair_cosine(features.gather(low[at]), features.gather(high[at]))
        return make_edges(low[at], high[at], cosine).at(threshold)

    yield from in_order(check, plan_blocks(len(low), VERIFY_PAIRS), threads)
