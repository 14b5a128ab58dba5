"""Write a synthetic set of features with planted duplicates, as LAION-like shards.

Originals are drawn like CLIP features: one shared direction, and a spread whose variances fall
with a power of their rank (--spectrum clip), or alike in all directions around cluster centres
(--spectrum flat), which is harder on coarse lists. A share of the rows are noisy copies of another
row, a few rows have thousands of noisy copies each, and some rows are repeated bit for bit. The
noise is alike in all directions.

    python scripts/synthetic.py OUT --rows 1000000 --dim 768
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

SHARD_ROWS = 100_000
CENTRES = 5000
SHARED, DECAY = 0.7, 0.75  # a shared direction as long as CLIP has; some 120 effective dimensions
SPREAD = 0.75  # length of what is a row's own, beside its centre's 1
COPY_NOISE = (0.05, 0.3)  # length of the noise on a planted copy: cosines of .999 to .957
HEAVY_NOISE = (0.05, 0.15)


def main() -> None:
    """Parse the arguments and write the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--duplicates", type=float, default=0.3, help="share of planted copies")
    parser.add_argument("--heavy", type=int, default=4, help="rows with thousands of copies")
    parser.add_argument("--heavy_copies", type=int, default=5000)
    parser.add_argument("--exact", type=float, default=0.1, help="share of bit-for-bit copies")
    parser.add_argument("--spectrum", choices=("clip", "flat"), default="clip")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source, noise = plan(options)
    write(options.out / "img_emb", source, noise, options)


def plan(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row which original it shows, and the length of its noise (0: bit for bit)."""
    rng = np.random.default_rng(options.seed)
    rows = options.rows
    source, noise = np.arange(rows), np.zeros(rows)
    shuffled = rng.permutation(rows)
    heavy = min(options.heavy * options.heavy_copies, rows // 10)
    exact = int(options.exact * rows)
    near = max(0, int(options.duplicates * rows) - heavy - exact)
    copies, originals = shuffled[: heavy + exact + near], shuffled[heavy + exact + near :]
    source[copies[:heavy]] = np.resize(originals[: options.heavy], heavy)
    source[copies[heavy:]] = rng.choice(originals, exact + near)
    noise[copies[:heavy]] = rng.uniform(*HEAVY_NOISE, heavy)
    noise[copies[heavy + exact :]] = rng.uniform(*COPY_NOISE, near)
    return source, noise


def write(folder: Path, source: np.ndarray, noise: np.ndarray, options: argparse.Namespace) -> None:
    """Write all originals to a file beside the shards, then the shards; remove the file."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, path = (options.rows, options.dim), folder.parent / "originals.part"
    base = np.memmap(path, np.float16, "w+", shape=shape)
    rng = np.random.default_rng([options.seed, 1])
    draw = clip_like if options.spectrum == "clip" else flat
    centres = unit(rng.standard_normal((CENTRES, options.dim), np.float32))
    for start in range(0, options.rows, SHARD_ROWS):
        count = min(SHARD_ROWS, options.rows - start)
        base[start : start + count] = draw(rng, count, centres)
    for number, start in enumerate(range(0, options.rows, SHARD_ROWS)):
        part = slice(start, min(start + SHARD_ROWS, options.rows))
        rows = base[source[part]]
        noisy = np.flatnonzero(noise[part])
        added = unit(rng.standard_normal((len(noisy), options.dim), np.float32))
        added *= noise[part][noisy, None].astype(np.float32)
        rows[noisy] = unit(rows[noisy].astype(np.float32) + added)
        np.save(folder / f"img_emb_{number:04d}.npy", rows)
        print(f"{part.stop:,} of {options.rows:,} rows", flush=True)
    path.unlink()


def clip_like(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Return rows with a shared direction and variances that fall with their rank."""
    dim = centres.shape[1]
    spread = np.arange(1, dim + 1) ** (-DECAY / 2)
    spread *= np.sqrt((1 - SHARED**2) / np.sum(spread**2))
    rows = rng.standard_normal((count, dim), np.float32) * spread.astype(np.float32)
    return unit(rows + SHARED * centres[0])


def flat(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Return rows around random centres, alike in all directions."""
    own = unit(rng.standard_normal((count, centres.shape[1]), np.float32))
    return unit(centres[rng.integers(0, len(centres), count)] + SPREAD * own)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
