"""How alike the rows of a set are: cosines of a sample with all, counted in narrow bins.

The sample's rows are compared with a pool, all rows where these are not too many. What is kept is
how many rows of the pool lie in each bin of cosines of each row of the sample; all else is derived.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import bad_rows, unit_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.parallel import ordered_map

STEPS = 1000  # bins a unit of cosine; the bin of 1 is for copies
BINS = 2 * STEPS + 1
CUTS = np.round(np.arange(-STEPS, STEPS + 1) / STEPS, 3)  # (BINS,) float64: lower ends of bins
BLOCK_ROWS, BLOCK_QUERIES = 4096, 512  # fixed, as they set last bits
OWN = 3.0  # instead of the cosine of a row with itself: past all bins
# A valley of nearest neighbours' cosines: between two peaks that both stand out of the noise.
LEAST_SIDE, LEAST_FALL, SURE = 0.02, 0.7, 4.0  # share of rows, of the lower peak; standard errors
WIDTHS = 0.005, 0.9  # of smoothing: the least; of Silverman's rule


class Similarities(NamedTuple):
    """Counts of the pool's rows by their cosines with each of ``n`` rows."""

    counts: np.ndarray  # (n, BINS) int32, without the row itself
    same: np.ndarray | None  # (n, BINS) int32: of these, those with the row's label

    def nearest(self) -> np.ndarray:
        """Return the bin of each row's nearest neighbour, (n,) int64."""
        return BINS - 1 - (self.counts[:, ::-1] > 0).argmax(axis=1)

    def best(self) -> dict[str, float]:
        """Return the line of the threshold above 0 with the best F1 over pairs; see `at`."""
        if self.same is None:
            raise ValueError("expected labels: without them no pair is known to be the same")
        parts = (part.sum(axis=0, dtype=np.int64) for part in (self.counts, self.same))
        found, right = (part[::-1].cumsum()[::-1] for part in parts)
        f1 = 2 * right / np.maximum(found + right[0], 1)
        return self.at(float(CUTS[STEPS + 1 + int(f1[STEPS + 1 :].argmax())]))

    def at(self, threshold: float) -> dict[str, float]:
        """Return what would happen at a threshold, as shares of rows or pairs.

        ``removed`` is 1 - mean 1/(1 + matches): at most so many go by the star rule where the keep
        order is random (Caro and Wei), exactly so many where groups are whole cliques.
        ``error`` is 1.96 standard errors of it. ``right`` is of rows with a match: those whose
        nearest neighbour has their label.
        """
        at = int(np.searchsorted(CUTS, threshold - 1e-9))
        matches = self.counts[:, at:].sum(axis=1, dtype=np.int64)
        goes = 1 - 1 / (1 + matches)
        found, rows = int(matches.sum()), len(matches)
        line = {
            "threshold": threshold,
            "random": found / max(int(self.counts.sum(dtype=np.int64)), 1),
            "matched": float((matches > 0).mean()),
            "removed": float(goes.mean()),
            "error": float(1.96 * goes.std() / np.sqrt(rows)),
        }
        if self.same is None:
            return line
        right, true = (int(self.same[:, b:].sum(dtype=np.int64)) for b in (at, 0))
        best = self.nearest()[:, None]
        both = (np.take_along_axis(c, best, 1)[matches > 0, 0] for c in (self.same, self.counts))
        near, every = both
        return line | {
            "precision": right / max(found, 1),
            "recall": right / max(true, 1),
            "f1": 2 * right / max(found + true, 1),
            "right": float((near / every).mean()) if len(every) else 1.0,
        }


def compare(
    features: Features,
    pool: np.ndarray,
    sample: np.ndarray,
    threads: int,
    labels: np.ndarray | None = None,
) -> Similarities:
    """Compare rows ``sample`` with rows ``pool``, of which they are some; these come in blocks.

    Both are (n,) int64, ascending. Cosines are float32 products, right to about 1e-6. Bad rows of
    the pool are left out; those of the sample must be none. ``labels``, int64, are one a row of the
    pool, the same for the same picture; -1 is like no other.
    """
    import torch

    queries = torch.from_numpy(unit_rows(features.gather(sample)))

    def count(span: tuple[int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        rows, every = pool[slice(*span)], len(pool) == features.rows
        block = features.read(*span) if every else features.gather(rows)
        good = ~bad_rows(block)
        unit = torch.from_numpy(unit_rows(block[good]))
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for start, stop in plan_blocks(len(sample), BLOCK_QUERIES):
            cosine = (queries[start:stop] @ unit.T).numpy()
            cosine[sample[start:stop, None] == rows[good]] = OWN
            bins = np.floor((cosine + (1 + 1e-6)) * STEPS).astype(np.int64).clip(0, BINS - 1)
            bins[cosine == OWN] = BINS
            bins += (np.arange(stop - start) * (BINS + 1))[:, None]
            parts[0].append(table(bins.ravel(), stop - start))
            if labels is not None:
                mine = labels[np.searchsorted(pool, sample[start:stop])][:, None]
                alike = (mine == labels[slice(*span)][good]) & (mine >= 0)
                parts[1].append(table(bins[alike], stop - start))
        return parts

    counts = np.zeros((len(sample), BINS), np.int32)
    same = None if labels is None else np.zeros_like(counts)
    spans = plan_blocks(len(pool), BLOCK_ROWS)
    done = ordered_map(count, spans, threads)
    for own, alike in progress.track(done, "comparing", "blocks", len(spans)):
        counts += np.concatenate(own)
        if same is not None:
            same += np.concatenate(alike)
    return Similarities(counts, same)


def table(bins: np.ndarray, rows: int) -> np.ndarray:
    """Return how often each bin of each row is named, (rows, BINS) int32."""
    found = np.bincount(bins, minlength=rows * (BINS + 1)).reshape(rows, BINS + 1)
    return found[:, :BINS].astype(np.int32)


def find_valley(nearest: np.ndarray) -> float | None:
    """Return the threshold between two kinds of nearest neighbours, None where there is one kind.

    ``nearest``, (n,) int64, are bins. Copies are left out. The counts are smoothed by a Gaussian;
    at a valley, they are less than .7 of the lower of the peaks beside it, by `SURE` standard
    errors, and both sides hold 2 % of the rows and more.
    """
    known = nearest[nearest < BINS - 1]
    if len(known) < 2 / LEAST_SIDE:
        return None
    spread = min(known.std(), np.subtract(*np.percentile(known, [75, 25])) / 1.34) / STEPS
    width = max(WIDTHS[0], WIDTHS[1] * spread * len(known) ** -0.2) * STEPS
    reach = int(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    counts = np.bincount(known, minlength=BINS).astype(np.float64)
    smooth = np.convolve(np.pad(counts, reach, mode="symmetric"), kernel, mode="valid")
    left, right = np.maximum.accumulate(smooth), np.maximum.accumulate(smooth[::-1])[::-1]
    peak, below = np.minimum(left, right), np.cumsum(counts) - counts
    fits = np.minimum(below, len(known) - below) >= LEAST_SIDE * len(known)
    fits &= (smooth < LEAST_FALL * peak) & (peak - smooth > SURE * np.sqrt(peak + smooth))
    if not fits.any():
        return None
    depth = np.where(fits, smooth / np.maximum(peak, 1e-12), np.inf)
    lowest = np.flatnonzero(depth <= depth.min() + 1e-9)
    return float(CUTS[lowest[len(lowest) // 2]])
