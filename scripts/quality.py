"""What is true, by brute force, and how near to it a method came.

Up to a given size every pair is looked at. Above it a sample of the distinct rows is compared with
all distinct rows, and what needs every pair is left out (None).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from snipdedup.features.cosine import PROPOSAL_ERROR, pair_cosine, unit_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import link_smaller
from snipdedup.parallel import cores, ordered_map

BLOCK = 8192  # rows compared with a tile of queries at a time
QUERY_TILE = 2048
PROOF_PAIRS = 4096
MOST_PAIRS = 200_000_000


@dataclass(frozen=True)
class Truth:
    """True pairs of a set.

    Attributes
    ----------
    first : (rows,) int64
        For each row the first row that is equal bit for bit; distinct rows name themselves.
    judged : (q,) int64
        Distinct rows whose pairs are all known, ascending.
    a, b : (p,) int64
        Each pair of distinct rows, at least one of them judged, once.
    """

    first: np.ndarray
    judged: np.ndarray
    a: np.ndarray
    b: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first)

    @property
    def full(self) -> bool:
        """Whether every pair is known."""
        return len(self.judged) == int((self.first == np.arange(self.rows)).sum())

    def copied(self) -> np.ndarray:
        """Return which rows have another one equal bit for bit, (rows,) bool."""
        return np.bincount(self.first, minlength=self.rows)[self.first] > 1

    def matched(self) -> np.ndarray:
        """Return which rows have a true match, (rows,) bool; holds for judged rows and copies."""
        distinct = np.zeros(self.rows, bool)
        distinct[self.a] = distinct[self.b] = True
        return distinct[self.first] | self.copied()

    def components(self) -> np.ndarray:
        """Return the smallest row of each row's component, (rows,) int64; needs full truth."""
        label = labels(self.rows, self.a, self.b)
        return label[self.first]

    def star(self) -> np.ndarray:
        """Return which rows star grouping removes, first row kept, (rows,) bool; as above."""
        low, high = np.minimum(self.a, self.b), np.maximum(self.a, self.b)
        order = np.argsort(high, kind="stable")
        low, ends = low[order], np.searchsorted(high[order], np.arange(self.rows + 1))
        goes = self.first != np.arange(self.rows)
        for row in np.unique(high):
            goes[row] |= not goes[low[ends[row] : ends[row + 1]]].all()
        return goes


def find_truth(features: Features, threshold: float, sample: int, most: int, seed: int) -> Truth:
    """Compare all distinct rows of up to ``most`` rows, else a sample of them, with all."""
    first = first_copies(features)
    distinct = np.flatnonzero(first == np.arange(len(first)))
    judged = distinct
    if features.rows > most:
        rng = np.random.default_rng(seed)
        judged = np.sort(rng.choice(distinct, min(sample, len(distinct)), replace=False))
    return Truth(first, judged, *true_pairs(features, judged, distinct, threshold))


def first_copies(features: Features) -> np.ndarray:
    """Return for each row the first row with the same bits, (rows,) int64."""
    first, seen = np.empty(features.rows, np.int64), dict[bytes, int]()
    for start, block in features.blocks(65_536):
        for row, data in enumerate(np.ascontiguousarray(block).view(np.uint8), start):
            first[row] = seen.setdefault(hashlib.blake2b(data, digest_size=16).digest(), row)
    return first


def true_pairs(
    features: Features, judged: np.ndarray, distinct: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of a judged and a distinct row once: products in float32, then proof.

    Raises
    ------
    SystemExit
        If there are too many pairs to hold.
    """
    is_judged = np.zeros(features.rows, bool)
    is_judged[judged] = True
    queries, parts, held = unit_rows(features.gather(judged)), [np.empty((2, 0), np.int64)], 0
    for begin, end in plan_blocks(len(distinct), BLOCK):
        rows = distinct[begin:end]
        block, all_judged = unit_rows(features.gather(rows)), is_judged[rows].all()
        for low, high in plan_blocks(len(judged), QUERY_TILE):
            if all_judged and judged[low] >= rows[-1]:
                break  # these pairs are found from their other side
            q, r = near(queries[low:high], block, threshold)
            q, r = judged[low + q], rows[r]
            once = (q < r) | ((q != r) & ~is_judged[r])
            parts.append(np.stack([q[once], r[once]]))
            held += parts[-1].shape[1]
            if held > MOST_PAIRS:
                raise SystemExit(f"more than {MOST_PAIRS:,} true pairs; judge fewer rows")
    a, b = np.concatenate(parts, axis=1)
    true = proved(features, a, b, threshold)
    return a[true], b[true]


def near(x: np.ndarray, y: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of all unit rows whose float32 product may reach the threshold."""
    import torch

    product = torch.from_numpy(x) @ torch.from_numpy(y).T
    places = np.asarray(torch.nonzero(product >= threshold - PROPOSAL_ERROR).numpy())
    return places[:, 0], places[:, 1]


def proved(features: Features, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    """Return which pairs reach the threshold by their float64 cosine, (p,) bool."""
    limit, true = np.float32(threshold), np.zeros(len(a), bool)
    order = np.lexsort((b, a))

    def prove(span: tuple[int, int]) -> np.ndarray:
        part = order[slice(*span)]
        return pair_cosine(features.gather(a[part]), features.gather(b[part])) >= limit

    spans = plan_blocks(len(a), PROOF_PAIRS)
    for span, result in zip(spans, ordered_map(prove, spans, cores()), strict=True):
        true[order[slice(*span)]] = result
    return true


def labels(rows: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the smallest row of each row's component, (rows,) int64."""
    label = np.arange(rows)
    link_smaller(label, a, b)
    return label


def judge(
    truth: Truth, features: Features, answer: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    threshold: float,
) -> dict[str, Any]:  # fmt: skip
    """Return how good an answer (a, b, removed) is; without ``removed``, components keep first.

    Pairs that are not true do not count; ``proved`` is the share of all removed rows that a true
    pair of the answer shows, also where only a sample is judged. Pair and row recall are over
    distinct rows: whatever joins a copy joins the row that it is a copy of.
    """
    a, b, removed = answer
    true = proved(features, a, b, threshold)
    label = labels(truth.rows, a[true], b[true])
    if removed is None:
        removed = label != np.arange(truth.rows)
    beyond_one = int((label != np.arange(truth.rows)).sum())
    collapsed = labels(truth.rows, truth.first[a[true]], truth.first[b[true]])
    shown = np.zeros(truth.rows, bool)
    shown[a[true]] = shown[b[true]] = True
    return {
        "removed": int(removed.sum()),
        "beyond_one": beyond_one,
        "false_pairs": int((~true).sum()),
        "proved": share(shown[removed]),
        "precision": precision(truth, removed),
        **sampled_recall(truth, collapsed),
        **whole_recall(truth, removed, beyond_one),
    }


def precision(truth: Truth, removed: np.ndarray) -> float | None:
    """Return the share of removed rows, among those judged, that have a true match."""
    known = np.zeros(truth.rows, bool)
    known[truth.judged] = True
    if truth.full:  # of a sample no copies: they always have a match, and would raise the share
        known[:] = True
    return share(truth.matched()[removed & known])


def sampled_recall(truth: Truth, label: np.ndarray) -> dict[str, float | None]:
    """Return how much of the true pairs lies in one component.

    Pair recall counts each pair once, ``pair_recall_by_row`` each judged row once, whatever the
    number of its pairs; row recall asks only whether a row that has a pair is in a group at all.
    """
    found = label[truth.a] == label[truth.b]
    ends = np.concatenate([truth.a, truth.b])
    total = np.bincount(ends, minlength=truth.rows)[truth.judged]
    hits = np.bincount(ends, np.tile(found, 2), minlength=truth.rows)[truth.judged]
    have = total > 0
    grouped = np.bincount(label, minlength=truth.rows)[label[truth.judged]] > 1
    return {
        "pair_recall": share(found),
        "pair_recall_by_row": share(hits[have] / total[have]),
        "row_recall": share(grouped[have]),
    }


def whole_recall(truth: Truth, removed: np.ndarray, beyond_one: int) -> dict[str, Any]:
    """Return what needs every pair: None for each where only a sample is judged.

    ``covered``: removed rows with a match that stays; ``beside``: rows that stay although an
    earlier row that stays matches them.
    """
    if not truth.full:
        return dict.fromkeys(("component_recall", "overlap", "covered", "beside"))
    beyond_true = int((truth.components() != np.arange(truth.rows)).sum())
    rows = np.flatnonzero(~removed)
    first_staying = np.full(truth.rows, -1)  # of the rows that are equal to a distinct row
    first_staying[truth.first[rows[::-1]]] = rows[::-1]
    stays = first_staying >= 0
    near_stay = stays.copy()
    near_stay[truth.a[stays[truth.b]]] = True
    near_stay[truth.b[stays[truth.a]]] = True
    a, b = (side[stays[truth.a] & stays[truth.b]] for side in (truth.a, truth.b))
    later = np.unique(np.where(first_staying[a] > first_staying[b], a, b))
    return {
        "component_recall": beyond_one / beyond_true if beyond_true else None,
        "overlap": share(removed[truth.star()]),
        "covered": share(near_stay[truth.first[removed]]),
        "beside": len(rows) - int(stays.sum()) + len(later),
    }


def share(values: np.ndarray) -> float | None:
    """Return the mean, None of nothing."""
    return float(np.mean(values)) if len(values) else None
