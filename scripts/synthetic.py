"""Write a synthetic set of features with planted duplicates, as LAION-like shards.

What is planted: unit rows around cluster centres (so that coarse lists have something to find),
of which a share are noisy copies of another row, a few rows have thousands of noisy copies each,
and some rows are repeated bit for bit.

    python scripts/synthetic.py OUT --rows 1000000 --dim 768
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

SHARD_ROWS = 100_000
CENTRES = 5000
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
    centres = unit(rng.standard_normal((CENTRES, options.dim), np.float32))
    centres = unit(centres + 0.7 * centres[0])  # CLIP features share a direction
    for start in range(0, options.rows, SHARD_ROWS):
        count = min(SHARD_ROWS, options.rows - start)
        own = unit(rng.standard_normal((count, options.dim), np.float32))
        which = rng.integers(0, CENTRES, count)
        base[start : start + count] = unit(centres[which] + SPREAD * own)
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


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
