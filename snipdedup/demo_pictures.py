"""Pictures that the demo draws, their edited copies, and plain descriptors of pixels.

Drawn and described in numpy, so that the demo needs no picture, no model and no network. Pictures
are (height, width, 3) float32 from 0 to 1.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

SIDE = 64  # pixels
CELLS = 4  # the grid of gradients and colours is CELLS x CELLS
DIRECTIONS = 8  # of gradients, over half a turn
WAVES = 8  # lowest frequencies of the DCT, each way
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# Steps of the luminance's frequencies in JPEG at quality 50 (ITU-T T.81, table K.1).
JPEG_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)


def draw(rng: np.random.Generator) -> np.ndarray:
    """Draw one picture: a background, then shapes on it."""
    grid = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    backgrounds = (gradient, stripes, clouds)
    picture = backgrounds[rng.integers(len(backgrounds))](x, y, rng)
    for _ in range(rng.integers(2, 7)):
        inside = shape(x, y, rng)[:, :, None]
        picture = picture * (1 - inside) + rng.random(3, np.float32) * inside
    return picture.astype(np.float32)


def gradient(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a run from one colour to another in some direction."""
    turn = rng.uniform(0, 2 * np.pi)
    share = (np.cos(turn) * x + np.sin(turn) * y)[:, :, None] / 3 + 0.5
    return rng.random(3) * share + rng.random(3) * (1 - share)


def stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return two colours in waves."""
    turn, waves, phase = rng.uniform(0, np.pi), rng.uniform(2, 9), rng.uniform(0, 6)
    share = np.sin((np.cos(turn) * x + np.sin(turn) * y) * waves + phase)[:, :, None] / 2 + 0.5
    return rng.random(3) * share + rng.random(3) * (1 - share)


def clouds(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return two colours in blotches: a few random values, stretched smoothly."""
    del x, y
    size = int(rng.integers(4, 9))
    stretch = resampling(size, 0, size, SIDE)
    share = (stretch @ rng.random((size, size)) @ stretch.T)[:, :, None]
    return rng.random(3) * share + rng.random(3) * (1 - share)


def shape(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how far each pixel lies inside an ellipse, a box or a diamond, 0 to 1."""
    turn, (left, up) = rng.uniform(0, np.pi), rng.uniform(-0.8, 0.8, 2)
    u = (np.cos(turn) * (x - left) + np.sin(turn) * (y - up)) / rng.uniform(0.15, 0.6)
    v = (np.cos(turn) * (y - up) - np.sin(turn) * (x - left)) / rng.uniform(0.15, 0.6)
    radii = (np.hypot(u, v), np.maximum(abs(u), abs(v)), abs(u) + abs(v))
    radius = radii[rng.integers(len(radii))]
    return np.clip((1 - radius) * SIDE / 6 + 0.5, 0, 1)  # edges a pixel or two wide


def resampling(size: int, start: float, stop: float, out: int) -> np.ndarray:
    """Return the (out, size) matrix that reads ``start`` to ``stop`` at ``out`` places."""
    step = (stop - start) / out
    at = np.clip(start + step * (np.arange(out) + 0.5) - 0.5, 0, size - 1)
    distance = abs(at[:, None] - np.arange(size)) / max(step, 1)  # wider where it shrinks
    weight = np.maximum(1 - distance, 0)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def resized(picture: np.ndarray, start: float, stop: float, out: int) -> np.ndarray:
    """Return the square ``start`` to ``stop`` of a picture in ``out`` x ``out`` pixels."""
    matrix = resampling(len(picture), start, stop, out)
    return np.einsum("yi,xj,ijc->yxc", matrix, matrix, picture, optimize=True)


def resize(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink to two fifths up to four fifths, and back."""
    small = int(SIDE * rng.uniform(0.4, 0.8))
    return resized(resized(picture, 0, SIDE, small), 0, small, SIDE)


def crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut off up to three pixels at each side, and stretch what is left."""
    margin = rng.uniform(1, 3)
    return resized(picture, margin, SIDE - margin, SIDE)


def jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round the frequencies of 8 x 8 blocks as JPEG does, at qualities of 15 to 50."""
    steps = JPEG_STEPS / 255 * (50 / rng.uniform(15, 50))
    blocks = picture.reshape(SIDE // 8, 8, SIDE // 8, 8, 3).transpose(0, 2, 4, 1, 3)
    cosines = cosine_basis(8, 8)
    rounded = np.round(cosines @ (blocks - 0.5) @ cosines.T / steps) * steps
    back = cosines.T @ rounded @ cosines + 0.5
    return back.transpose(0, 3, 1, 4, 2).reshape(SIDE, SIDE, 3)


def brightness(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make lighter or darker, and change the contrast."""
    return (picture - 0.5) * rng.uniform(0.8, 1.15) + 0.5 + rng.uniform(-0.12, 0.12)


def exact(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change nothing."""
    del rng
    return picture


EDITS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "exact": exact,
    "jpeg": jpeg,
    "resize": resize,
    "brightness": brightness,
    "crop": crop,
}


def stored(picture: np.ndarray) -> np.ndarray:
    """Return what an 8-bit file would hold of a picture."""
    return (np.round(np.clip(picture, 0, 1) * 255) / 255).astype(np.float32)


def cosine_basis(size: int, count: int) -> np.ndarray:
    """Return the ``count`` lowest waves of the orthonormal DCT-II, (count, size)."""
    waves = np.arange(count)[:, None] * (2 * np.arange(size) + 1) * np.pi / (2 * size)
    basis = np.cos(waves) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def describe(picture: np.ndarray) -> np.ndarray:
    """Return gradients by place and direction, low frequencies and colours by place.

    Returns
    -------
    (CELLS² · DIRECTIONS + WAVES² - 1 + CELLS² · 3,) float32
        Each of the three parts has norm 1.
    """
    grey = picture @ GREY
    pool = resampling(SIDE, 0, SIDE, CELLS)
    dy, dx = np.gradient(grey)
    direction = np.arctan2(dy, dx) % np.pi * (DIRECTIONS / np.pi)
    away = abs(direction[None] - np.arange(DIRECTIONS)[:, None, None])
    share = np.maximum(1 - np.minimum(away, DIRECTIONS - away), 0) * np.hypot(dx, dy)
    gradients = np.sqrt(pool @ share @ pool.T)
    basis = cosine_basis(SIDE, WAVES)
    waves = (basis @ grey @ basis.T).ravel()[1:]
    colours = np.einsum("yi,xj,ijc->yxc", pool, pool, picture, optimize=True) - 0.5
    return np.concatenate([unit(part.ravel()) for part in (gradients, waves, colours)])


def unit(values: np.ndarray) -> np.ndarray:
    """Return values scaled to norm 1; an empty picture stays zeros."""
    return values / max(float(np.linalg.norm(values)), 1e-6)


def features_of(descriptors: np.ndarray) -> np.ndarray:
    """Return (n, d) float16 features: each dimension centred and scaled over all, then norm 1.

    What all pictures share says nothing about which of them are copies.
    """
    centred = descriptors - descriptors.mean(axis=0)
    centred /= centred.std(axis=0) + 1e-6
    return (centred / np.linalg.norm(centred, axis=1, keepdims=True)).astype(np.float16)


def png(picture: np.ndarray) -> bytes:
    """Return a picture of any size as a PNG file."""
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    height, width, _ = pixels.shape
    lines = np.insert(pixels.reshape(height, width * 3), 0, 0, axis=1)  # 0: unfiltered
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
