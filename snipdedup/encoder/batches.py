"""The rows that training sees: random distinct rows in memory, batch by batch.

Some rows are held out and only reported on. Which rows a step sees depends on the seed and the
step alone, so a stopped run goes on where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from snipdedup.errors import SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.hashing import row_hashes
from snipdedup.features.scan import refuse_bad
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.statistics import sample_rows

LEAST_ROWS = 64  # distinct rows to learn anything from
CAPTIONS = 8  # of one image that are held out: else a frequent one would be all that is judged
READ_ROWS = 65_536  # rows gathered at a time
SUBSET_PASSES = 4  # over rows in memory before others are drawn
PAIR = 0x9E3779B97F4A7C15  # odd: folds the hashes of an image and its text into one


class Rows(NamedTuple):
    """Rows in memory: float16 as stored, or float32 of norm 1."""

    images: np.ndarray  # (n, d)
    texts: np.ndarray | None  # (n, d)

    def take(self, which: np.ndarray | slice) -> Rows:
        """Return some of the rows."""
        return Rows(self.images[which], None if self.texts is None else self.texts[which])

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return unit rows on the device: images, and texts if there are any."""
        x = torch.from_numpy(unit_rows(self.images)).to(device)
        t = None if self.texts is None else torch.from_numpy(unit_rows(self.texts)).to(device)
        return x, t


class Batches:
    """Draws rows into memory, a subset at a time, and gives each step its batch.

    ``held_out`` rows and others of the same images are never trained on; ``rows`` are the subset in
    memory, ``subset`` its number. A step has ``batch`` rows, or all where they are fewer.
    """

    def __init__(
        self, features: Features, texts: Features | None, *, subset_rows: int,
        validation_rows: int, batch: int, seed: int,
    ) -> None:  # fmt: skip
        self.features, self.texts, self.seed = features, texts, seed
        self.wanted = subset_rows + validation_rows
        self.held_out, self.rows = hold_out(self.draw(0), validation_rows, features.rows)
        self.batch = min(batch, len(self.rows.images))
        self.subset_steps = SUBSET_PASSES * (len(self.rows.images) // self.batch)
        self.subset, self.order = 0, (-1, -1, np.empty(0, np.int64))

    def draw(self, subset: int) -> Rows:
        """Return random distinct rows; the same ones for the same number."""
        rng = np.random.default_rng([self.seed, subset])
        picked = sample_rows(self.features.rows, self.wanted, rng)
        rows = load_distinct(self.features, self.texts, picked)
        return rows.take(rng.permutation(len(rows.images)))

    def of_step(self, step: int) -> Rows:
        """Return the rows of a step, counted from 1."""
        subset, place = 0, step - 1
        if self.features.rows > self.wanted:  # not all rows fit: others come after some passes
            subset, place = divmod(place, self.subset_steps)
        if subset != self.subset:
            rows, held_out = self.draw(subset), row_hashes(self.held_out.images)
            self.rows = rows.take(~np.isin(row_hashes(rows.images), held_out))
            self.subset = subset
        count = len(self.rows.images)
        passes, place = divmod(place, max(count // self.batch, 1))
        if self.order[:2] != (subset, passes):
            rng = np.random.default_rng([self.seed, subset, passes])
            self.order = subset, passes, rng.permutation(count)
        return self.rows.take(self.order[2][place * self.batch : (place + 1) * self.batch])


def hold_out(rows: Rows, wanted: int, among: int) -> tuple[Rows, Rows]:
    """Return the first ``wanted`` rows, a fifth at the most, and those of other images.

    Of an image with many captions a few are held out, and the rest is in neither part. Fewer than
    `LEAST_ROWS` images, drawn ``among`` so many rows, are refused.
    """
    _, first, which = np.unique(row_hashes(rows.images), return_index=True, return_inverse=True)
    if len(first) < LEAST_ROWS:
        raise SnipError(
            f"expected at least {LEAST_ROWS} distinct rows to train on, found {len(first)} "
            f"among {among:,}; train on more features"
        )
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(first)))
    turn = np.empty(len(which), np.int64)  # of a row among those of its image
    turn[order] = np.arange(len(which)) - starts[which[order]]
    few = turn < CAPTIONS
    last = np.sort(first[which][few])[min(wanted, few.sum() // 5) - 1]
    held_out = first[which] <= last
    return rows.take(held_out & few), rows.take(~held_out)


def load_distinct(features: Features, texts: Features | None, picked: np.ndarray) -> Rows:
    """Load the global rows ``picked``, (n,) int64 ascending, each distinct one once.

    Copies would be drawn more often, and be each other's only neighbour. With texts, distinct
    pairs of image and text count. Rows that cannot be compared are refused: file and row.
    """
    hashes, parts = np.zeros(len(picked), np.uint64), []
    for source in filter(None, (features, texts)):
        blocks = []
        for start, stop in plan_blocks(len(picked), READ_ROWS):
            rows = source.gather(picked[start:stop])
            refuse_bad(source, picked[start:stop], rows)
            hashes[start:stop] = hashes[start:stop] * np.uint64(PAIR) + row_hashes(rows)
            # Half the memory as float16; wider types are scaled first, so that none overflows.
            blocks.append(rows if rows.dtype == np.float16 else unit_rows(rows))
        parts.append(np.concatenate(blocks))
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return Rows(parts[0], parts[1] if texts else None).take(first)
