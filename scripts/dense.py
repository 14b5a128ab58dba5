"""Make a large dense set from a real one: every row several times, each time moved by noise.

The noise is Gaussian with the covariance of the real set, made orthogonal to the row, so that
copies spread where real rows spread. Of a quarter of the copies the cosine with their row is .985,
of the others uniform in .90 to .95. The order is random: real sets of images from the web have
copies anywhere.

    python scripts/dense.py FEATURES OUT --times 16

It needs memory for one shard, one block, and 8 bytes a row. The same seed gives the same bits on
every processor: what is summed by BLAS, in an order that depends on it, is integers that float32
or float64 hold exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from synthetic import SHARD_ROWS, unit

from snipdedup.features.shards import Features, open_features

BLOCK = 4096
NEAR_SHARE = 0.25
NOISE = (0.985, 0.90, 0.95)
GRID = 2**14  # unit rows times this, rounded: float64 sums products of 2**25 rows exactly
DRAW = 32  # a standard deviation of the Gaussian integers
MOST_DRAWN = 127
EXACT = 2**24  # float32 holds all integers up to here


def main(argv: Sequence[str] | None = None) -> None:
    """Write the set; its folder appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", help="folder of feature shards")
    parser.add_argument("out", type=Path, help="the shards go to OUT/img_emb")
    parser.add_argument("--times", type=int, default=16, help="copies of each row")
    parser.add_argument(
        "--noise", type=float, nargs=3, default=NOISE, metavar=("NEAR", "LOW", "HIGH"),
        help="cosine of a quarter of the copies with their row, and the range of the others'",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    features, folder = open_features(given.features), given.out / "img_emb"
    if folder.exists():
        raise SystemExit(f"{folder} exists; remove it or give another OUT")
    part = folder.with_name("img_emb.part")
    part.mkdir(parents=True, exist_ok=True)
    rows = features.rows * given.times
    for number, shard in enumerate(shards(features, given.times, given.noise, given.seed)):
        np.save(part / f"img_emb_{number:04d}.npy", shard)
        print(f"{min((number + 1) * SHARD_ROWS, rows):,} of {rows:,} rows", flush=True)
    part.rename(folder)


def shards(
    features: Features, times: int, noise: Sequence[float], seed: int
) -> Iterator[np.ndarray]:
    """Yield the rows shard by shard, unit, float16; the memory is used again for the next."""
    order, factor = source_rows(features.rows, times, seed), noise_factor(features)
    rng = np.random.default_rng([seed, 1])
    shard = np.empty((SHARD_ROWS, features.dim), np.float16)
    for first in range(0, len(order), SHARD_ROWS):
        source = order[first : first + SHARD_ROWS]
        cosine = rng.uniform(noise[1], noise[2], len(source))
        near = rng.permutation(len(source)) < round(NEAR_SHARE * len(source))
        cosine[near] = noise[0]
        for start in range(0, len(source), BLOCK):
            part = slice(start, min(start + BLOCK, len(source)))
            rows = unit(features.gather(source[part]).astype(np.float64))
            drawn = rng.standard_normal(rows.shape, np.float32) * DRAW
            noisy = np.clip(np.rint(drawn), -MOST_DRAWN, MOST_DRAWN) @ factor
            shard[part] = at_cosine(rows, noisy, cosine[part])
        yield shard[: len(source)]


def source_rows(rows: int, times: int, seed: int) -> np.ndarray:
    """Return for each row of the dense set the real row that it shows, (rows * times,) int64."""
    return np.random.default_rng(seed).permutation(rows * times) // times


def noise_factor(features: Features) -> np.ndarray:
    """Return F such that Gaussian integers @ F have the set's covariance, but for a scale.

    (dim, dim) float32 of integers so small that no product of a drawn row exceeds `EXACT`.

    Raises
    ------
    SystemExit
        If a row has no direction.
    """
    dim = features.dim
    total, squares = np.zeros(dim), np.zeros((dim, dim))
    for start, block in features.blocks(BLOCK):
        rows = block.astype(np.float64)
        lengths = np.sqrt((rows * rows).sum(axis=1))
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise SystemExit(f"rows {start} to {start + len(rows)}: zero or not finite")
        whole = np.rint(rows / lengths[:, None] * GRID)
        total += whole.sum(axis=0)
        squares += whole.T @ whole
    covariance = squares - np.outer(total, total) / features.rows
    # the ridge keeps directions without any spread from breaking the factorisation
    ridge = 1e-6 * np.trace(covariance) / dim * np.eye(dim)
    factor = np.linalg.cholesky(covariance + ridge).T
    largest = np.abs(factor).sum(axis=0).max()
    scale = (EXACT / MOST_DRAWN - dim) / largest  # rounding adds at most 1/2 an entry
    return np.rint(factor * scale).astype(np.float32)


def at_cosine(rows: np.ndarray, noise: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return rows at given cosines from unit rows, each in the direction of its noise.

    (n, dim) float64; ``rows`` float64.
    """
    across = noise - (noise * rows).sum(axis=1, keepdims=True) * rows
    length = np.sqrt((across * across).sum(axis=1, keepdims=True))
    return cosine[:, None] * rows + np.sqrt(1 - cosine[:, None] ** 2) / length * across


if __name__ == "__main__":
    main()
