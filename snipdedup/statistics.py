"""Samples and rankings: how sure a share of a sample is; recall, ranks and precision."""

from __future__ import annotations

import math

import numpy as np

TERMS, TERMS_A_ROOT = 100, 5  # of the continued fraction: some, and per root of its parameters
HALVINGS = 60  # of the interval 0 .. 1 until float64 is exhausted
COMPARED_ROWS = 256  # whose neighbours are compared at a time, k x k each
SAME = 1e-6  # similarities closer than this are one: copies differ in their last bits


def proportion_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval (low, high) of a share of which ``k`` of ``n`` was seen.

    It holds the true share in at least ``level`` of all samples, also where ``k`` is 0 or ``n``
    (Clopper and Pearson, Biometrika 26, 1934). An empty sample gives (0, 1).
    """
    if not 0 <= k <= n or not 0 < level < 1:
        raise ValueError(f"expected 0 <= k <= n and 0 < level < 1, found {k=}, {n=}, {level=}")
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else beta_quantile(tail, k, n - k + 1)
    high = 1.0 if k == n else 1 - beta_quantile(tail, n - k, k + 1)
    return low, high


def beta_quantile(share: float, a: float, b: float) -> float:
    """Return x with I_x(a, b) = ``share``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        x = (low + high) / 2
        low, high = (x, high) if incomplete_beta(x, a, b) < share else (low, x)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction.

    DLMF 8.17.22; it converges fast below the mean, above it I_x(a, b) = 1 - I_(1-x)(b, a).
    """
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    fraction = 0.0
    for m in range(TERMS + int(TERMS_A_ROOT * math.sqrt(max(a, b))), -1, -1):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        fraction = odd / (1 + even / (1 + fraction))
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    power = a * math.log(x) + b * math.log1p(-x) - log_beta
    return math.exp(power) / (a * (1 + fraction))


def sample_rows(rows: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Return random row numbers, ascending int64, all where there are no more."""
    return np.sort(rng.choice(rows, min(wanted, rows), replace=False, shuffle=False))


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return the share of the ``k`` truly nearest rows, (q, k), that are among the first found.

    -1 stands where there is no such row.
    """
    hits, truth, found = 0, truth[:, :k], found[:, :k]
    for start in range(0, len(found), COMPARED_ROWS):
        span = slice(start, start + COMPARED_ROWS)
        same = truth[span, :, None] == found[span, None, :]
        hits += int((same.any(axis=2) & (truth[span] >= 0)).sum())
    wanted = int((truth >= 0).sum())
    return hits / wanted if wanted else 1.0


def partner_ranks(similarity: np.ndarray, wanted: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Return how many columns of other items are nearer than the best of one's own, (n,) float64.

    A tie counts half: descriptors that are all alike find nothing. Copies of one picture are one
    item, as no descriptor can tell them apart. ``wanted`` (n,) are the items that the rows of
    ``similarity`` (n, m) look for, ``item`` (m,) those of its columns.
    """
    own = wanted[:, None] == item
    best = np.where(own, similarity, -np.inf).max(axis=1)[:, None]
    above = (~own & (similarity > best + SAME)).sum(axis=1)
    ties = (~own & (np.abs(similarity - best) <= SAME)).sum(axis=1)
    return above + ties / 2


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Return the area under precision by recall; a higher score is surer, equal ones are one."""
    order = np.argsort(-score, kind="stable")
    score, right = score[order], np.cumsum(truth[order])
    ends = np.append(score[1:] != score[:-1], True)
    gained = np.diff(right[ends], prepend=0)
    precision = right[ends] / (np.flatnonzero(ends) + 1)
    return float((precision * gained).sum() / max(int(right[-1]), 1))
