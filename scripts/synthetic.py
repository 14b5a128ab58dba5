"""Write a synthetic set of features with planted duplicates, as LAION-like shards.

Originals are drawn like CLIP features: one shared direction, and a spread whose variances fall
with a power of their rank (--spectrum clip), or alike in all directions around cluster centres
(--spectrum flat), which is harder on coarse lists. A share of the rows are noisy copies of another
row, a few rows have thousands of noisy copies each, and some rows are repeated bit for bit. The
noise is alike in all directions.

--spectrum hierarchical is nearest to real features. A row is the sum of a shared direction, a
topic's, a subtopic's and its own, whose variances fall with a power of their rank. Topics, and
subtopics within each, are as frequent as Zipf's law says; some subtopics are denser than others.
Copies of one row make a group whose size has a heavy tail, up to --heavy_copies; their cosines with
it spread from .9 to 1, in some groups less, and --heavy plays no part.

    python scripts/synthetic.py OUT --rows 1000000 --dim 768
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHARD_ROWS = 100_000
CENTRES = 5000
SHARED, DECAY = 0.7, 0.75  # a shared direction as long as CLIP has; some 120 effective dimensions
SPREAD = 0.75  # length of what is a row's own, beside its centre's 1
COPY_NOISE = (0.05, 0.3)  # length of the noise on a planted copy: cosines of .999 to .957
HEAVY_NOISE = (0.05, 0.15)

# --spectrum hierarchical: squared lengths of the parts of a row; own is what they leave of 1
SHARED_PART, TOPIC_PART, SUBTOPIC_PART = 0.3, 0.1, (0.0, 0.47)
TOPICS, SUBTOPICS = 1000, 30  # subtopics of each topic
GROUP_TAIL = 1.1  # of the sizes of groups: P(size > s) = s ** -GROUP_TAIL
LEAST_COSINE = 0.9  # of a copy with its row


class Topics(NamedTuple):
    """All subtopics: centres (n, dim), lengths of their rows' own parts (n,), running weight."""

    centres: np.ndarray
    own: np.ndarray
    ends: np.ndarray


def main() -> None:
    """Write the set."""
    options = parse()
    make_plan = plan_groups if options.spectrum == "hierarchical" else plan
    source, noise = make_plan(options)
    write(options.out / "img_emb", source, noise, options)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--duplicates", type=float, default=0.3, help="share of planted copies")
    parser.add_argument("--heavy", type=int, default=4, help="rows with thousands of copies")
    parser.add_argument("--heavy_copies", type=int, default=5000)
    parser.add_argument("--exact", type=float, default=0.1, help="share of bit-for-bit copies")
    parser.add_argument("--spectrum", choices=("clip", "flat", "hierarchical"), default="clip")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


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


def plan_groups(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `plan` where groups have sizes with a heavy tail."""
    rng = np.random.default_rng(options.seed)
    source, noise = np.arange(options.rows), np.zeros(options.rows)
    shuffled = rng.permutation(options.rows)
    count = int(options.duplicates * options.rows)
    copies, originals = shuffled[:count], shuffled[count:]
    sizes = 1 + rng.pareto(GROUP_TAIL, len(originals)).astype(np.int64)
    sizes = np.minimum(sizes, options.heavy_copies)
    used = np.searchsorted(np.cumsum(sizes), count) + 1
    group = np.repeat(np.arange(len(originals))[:used], sizes[:used])
    group = np.resize(group, count)  # again from the first, if they are too few
    source[copies] = originals[group]
    least = rng.uniform(LEAST_COSINE, 1, len(originals))
    cosine = rng.uniform(least[group], 1)
    noisy = rng.random(count) * options.duplicates >= options.exact
    noise[copies[noisy]] = np.sqrt(1 / cosine[noisy] ** 2 - 1)
    return source, noise


def write(folder: Path, source: np.ndarray, noise: np.ndarray, options: argparse.Namespace) -> None:
    """Write all originals to a file beside the shards, then the shards; remove the file."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, path = (options.rows, options.dim), folder.parent / "originals.part"
    base = np.memmap(path, np.float16, "w+", shape=shape)
    rng = np.random.default_rng([options.seed, 1])
    draw: Callable[[np.random.Generator, int], np.ndarray]
    if options.spectrum == "hierarchical":
        draw = partial(hierarchical, topics=draw_topics(rng, options.dim))
    else:
        centres = unit(rng.standard_normal((CENTRES, options.dim), np.float32))
        draw = partial(clip_like if options.spectrum == "clip" else flat, centres=centres)
    for start in range(0, options.rows, SHARD_ROWS):
        count = min(SHARD_ROWS, options.rows - start)
        base[start : start + count] = draw(rng, count)
    for number, start in enumerate(range(0, options.rows, SHARD_ROWS)):
        part = slice(start, min(start + SHARD_ROWS, options.rows))
        rows = base[source[part]]
        noisy = np.flatnonzero(noise[part])
        added = unit(rng.standard_normal((len(noisy), options.dim), np.float32))
        if options.spectrum == "hierarchical":
            added = across(added * falling(options.dim), rows[noisy].astype(np.float32))
        added *= noise[part][noisy, None].astype(np.float32)
        rows[noisy] = unit(rows[noisy].astype(np.float32) + added)
        np.save(folder / f"img_emb_{number:04d}.npy", rows)
        print(f"{part.stop:,} of {options.rows:,} rows", flush=True)
    path.unlink()


def clip_like(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Return rows with a shared direction and variances that fall with their rank."""
    dim = centres.shape[1]
    rows = rng.standard_normal((count, dim), np.float32) * falling(dim, 1 - SHARED**2)
    return unit(rows + SHARED * centres[0])


def falling(dim: int, length: float = 1.0) -> np.ndarray:
    """Return standard deviations that fall with their rank, float32, for a squared length."""
    spread = np.arange(1, dim + 1) ** (-DECAY / 2)
    spread *= np.sqrt(length / np.sum(spread**2))
    return spread.astype(np.float32)


def flat(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Return rows around random centres, alike in all directions."""
    own = unit(rng.standard_normal((count, centres.shape[1]), np.float32))
    return unit(centres[rng.integers(0, len(centres), count)] + SPREAD * own)


def draw_topics(rng: np.random.Generator, dim: int) -> Topics:
    """Return all subtopics of all topics."""
    shape = (TOPICS, SUBTOPICS, dim)
    spread = falling(dim)
    part = rng.uniform(*SUBTOPIC_PART, shape[:2]).astype(np.float32)
    centres = rng.standard_normal(shape, np.float32) * spread * np.sqrt(part)[..., None]
    topics = rng.standard_normal((TOPICS, 1, dim), np.float32) * spread
    centres += np.float32(TOPIC_PART**0.5) * topics
    centres += np.float32(SHARED_PART**0.5) * unit(rng.standard_normal((1, dim), np.float32))
    zipf = 1 / np.arange(1, TOPICS + 1)[:, None] / np.arange(1, SUBTOPICS + 1)
    own = np.sqrt(1 - SHARED_PART - TOPIC_PART - part)
    return Topics(centres.reshape(-1, dim), own.ravel(), np.cumsum(zipf))


def hierarchical(rng: np.random.Generator, count: int, topics: Topics) -> np.ndarray:
    """Return rows around the centres of subtopics."""
    place = np.searchsorted(topics.ends, rng.random(count) * topics.ends[-1], side="right")
    dim = topics.centres.shape[1]
    own = rng.standard_normal((count, dim), np.float32) * falling(dim)
    return unit(topics.centres[place] + topics.own[place, None] * own)


def across(directions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the unit parts of directions that are orthogonal to unit rows."""
    return unit(directions - (directions * rows).sum(axis=1, keepdims=True) * rows)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
