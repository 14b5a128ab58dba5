"""Perceptual hashes of 256 bits, PDQ and pHash: what a picture's coarse pattern is.

Both shrink a picture to 64 × 64 grey values, and tell of 256 low frequencies of its cosine
transform whether each is above their median. pHash is ``imagehash.phash(hash_size=16)``. PDQ is
that of "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (Facebook, 2019).
All sums are of integers, so a picture has the same bits on every processor.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE, KEPT = 64, 16  # grey values and frequencies each way
BITS = KEPT * KEPT
LARGEST = 512  # pixels of the longer side that PDQ filters; larger pictures are shrunk before
WEIGHT_BITS, WAVE_BITS, FINE_BITS = 14, 17, 8  # fractions of weights, of cosines, of PDQ's greys
# Of 256 frequencies, a picture that changes along one axis only has 16 that stand out from what
# rounding to whole grey values makes, one of rows plus columns has 31, photos have 57 and more.
STANDING, PLAIN = 30, 40  # grey values that a frequency needs; frequencies that a picture needs
RESTING = 3  # grey values from the median: half of the frequencies of a mirrored shape are nearer


def phash_bits(picture: Image.Image) -> np.ndarray:
    """Return the pHash of an RGB picture, 256 bits packed in 32 bytes: frequencies 0 to 15."""
    from PIL import Image

    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return bits_of(np.asarray(grey).astype(np.int64) << FINE_BITS, 0, picture)


def pdq_bits(picture: Image.Image) -> np.ndarray:
    """Return the PDQ hash of an RGB picture, packed: frequencies 1 to 16."""
    small = picture
    if max(picture.size) > LARGEST:
        small = picture.copy()
        small.thumbnail((LARGEST, LARGEST))
    grey = np.asarray(small.convert("L")).astype(np.int64)
    for _ in range(2):  # columns, then rows
        at, weights = tent(len(grey))
        grey = np.einsum("it,itj->ji", weights, grey[at])
    drop = 2 * WEIGHT_BITS - FINE_BITS
    return bits_of((grey + (1 << (drop - 1))) >> drop, 1, picture)


def bits_of(grey: np.ndarray, first: int, picture: Image.Image) -> np.ndarray:
    """Return the bits of (64, 64) grey values, in 256ths: frequencies from ``first`` on.

    The bits of a plain picture would be those of rounding, or of ties at the median, and alike for
    all: single colours, stripes, gradients, drawn shapes that equal their mirror image. They are
    the SHA-256 of its shrunken pixels instead, so that it is near to what looks exactly like it.
    """
    waves = cosines(first)
    low = (waves @ grey @ waves.T).ravel()  # below 2 ** 62
    low -= np.partition(low, BITS // 2 - 1)[BITS // 2 - 1]
    apart = np.abs(low) >> (2 * WAVE_BITS + FINE_BITS)  # grey values from the median
    if np.sum(apart >= STANDING) < PLAIN or 2 * np.sum(apart < RESTING) >= BITS:
        from PIL import Image

        pixels = picture.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
        return np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8)
    return np.packbits(low > 0)


@cache
def cosines(first: int) -> np.ndarray:
    """Return 16 rows of the cosine transform of 64 values, (16, 64) int64, frequency by row."""
    place, frequency = np.arange(SIDE), np.arange(first, first + KEPT)[:, None]
    waves = np.cos(np.pi / (2 * SIDE) * (2 * place + 1) * frequency)
    return np.rint(waves * (1 << WAVE_BITS)).astype(np.int64)


@lru_cache(1024)
def tent(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where 64 samples of ``length`` values look, and with which weights; (64, t) int64.

    Two means over windows of a 128th of the length, one after the other, and of what comes out the
    middle of each 64th. Weights are integers, 2 ** 14 in all.
    """
    window = -(-length // (2 * SIDE))
    reach = np.arange(length)
    # a mean looks ahead by half the window, or one more than half if that is even
    begin = np.maximum(reach - (window - 1) // 2, 0)
    end = np.minimum(reach + window // 2 + 1, length)
    mean = ((reach >= begin[:, None]) & (reach < end[:, None])) / (end - begin)[:, None]
    middle = (2 * np.arange(SIDE) + 1) * length // (2 * SIDE)
    twice = np.stack([mean[begin[i] : end[i]].mean(axis=0) for i in middle])
    weights = np.rint(twice * (1 << WEIGHT_BITS)).astype(np.int64)
    weights[np.arange(SIDE), middle] += (1 << WEIGHT_BITS) - weights.sum(axis=1)
    taps = int((weights != 0).sum(axis=1).max())
    start = np.minimum((weights != 0).argmax(axis=1), length - taps)
    at = start[:, None] + np.arange(taps)
    return at, np.take_along_axis(weights, at, axis=1)
