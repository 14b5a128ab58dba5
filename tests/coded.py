"""Codes for tests of lists, and the rule of visits in float64."""

from __future__ import annotations

import numpy as np

WIDTH = 32


def codes_of(rows, seed, spread=20, clusters=12):
    rng = np.random.default_rng(seed)
    centres = rng.integers(-100, 101, (clusters, WIDTH))
    x = centres[rng.integers(0, clusters, rows)] + rng.normal(0, spread, (rows, WIDTH))
    return np.rint(x).clip(-127, 127).astype(np.int8)


def squared(x, y):
    x, y = x.astype(np.int64), y.astype(np.int64)
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(2)


def visited(codes, lists):
    """(rows, nlist) bool: as the rule words it, in float64."""
    gaps = squared(codes, lists.centroids)
    home = gaps.argmin(1)
    apart = np.sqrt(squared(lists.centroids, lists.centroids))
    to_bisector = (gaps - gaps[np.arange(len(codes)), home][:, None]) / (2 * apart[home]).clip(1e-9)
    near = to_bisector <= lists.tau
    near[np.arange(len(codes)), home] = True
    return near, home
