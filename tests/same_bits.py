"""What every set of kernels computes, numpy's too, compared bit for bit."""

from __future__ import annotations

import numpy as np

from snipdedup import native


def by_all_kernels(compute):
    """Return what ``compute`` does by numpy; all compiled kernels must return the same bits."""
    before = native.used()
    try:
        native.use("numpy")
        expected = compute()
        for name in native.names()[:-1]:
            native.use(name)
            for found, wanted in zip(arrays(compute()), arrays(expected), strict=True):
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
                assert bits(found) == bits(wanted), f"{name}: {first_difference(found, wanted)}"
    finally:
        native.use(before)
    return expected


def arrays(found):
    return found if isinstance(found, tuple) else (found,)


def bits(array):
    """The bytes of an array; of NaN there is one."""
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return np.ascontiguousarray(array).tobytes()


def first_difference(found, wanted):
    places = np.argwhere((found != wanted) & ~(np.isnan(found) & np.isnan(wanted)))
    return [(tuple(at), found[tuple(at)], wanted[tuple(at)]) for at in places[:3]]
