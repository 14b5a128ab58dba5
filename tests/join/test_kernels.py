"""Hits of tiles are those of plain integers, on the processor and as CUDA computes them."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import native
from snipdedup.join.kernels import TileColumns, kernel_name


def expected(rows, columns, limits, falls, wide, first, references, references_only):
    """The places that reach both limits, by int64 products."""
    table = rows.astype(np.int64) @ columns.T.astype(np.int64) + falls
    found = table >= limits[:, None]
    if wide is not None:
        x, y, least, more = wide
        found &= x.astype(np.int64) @ y.T.astype(np.int64) + more >= least[:, None]
    place = np.arange(len(columns))
    found &= place < np.arange(len(rows))[:, None] + first
    old, known = references[0][:, None], references[1][None, :]
    found &= (old != known) if references_only else ~(old & known)
    return sorted(zip(*map(np.ndarray.tolist, np.nonzero(found)), strict=True))


@contextmanager
def on_cpu():
    """Let what is meant for CUDA run on the processor.

    Its own int8 product is replaced: without VNNI, oneDNN's adds in 16 bits, and may saturate.
    """

    def product(a, b):
        return a.int() @ b.int()

    with (
        mock.patch.object(torch.Tensor, "to", lambda tensor, device: tensor),
        mock.patch.object(torch, "_int_mm", product),
    ):
        yield


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    width=st.sampled_from([64, 128]),
    has_wide=st.booleans(),
    first=st.sampled_from([0, 3, native.EVERY_COLUMN]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    references_only=st.booleans(),
)
def test_a_device_finds_the_hits_of_plain_integers(
    seed, m, n, width, has_wide, first, share, references_only
):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-127, 128, (count, width), np.int8) for count in (m, n))
    wide_x, wide_y = (rng.integers(-127, 128, (count, 32), np.int8) for count in (m, n))
    falls, wide_falls = (rng.integers(0, 50_000, n).astype(np.int32) for _ in range(2))
    limits = rng.integers(-40_000, 40_000, m).astype(np.int32)
    wide_limits = rng.integers(-60_000, 60_000, m).astype(np.int32)
    references = rng.random(m) < share, rng.random(n) < share
    wide = (wide_x, wide_y, wide_limits, wide_falls) if has_wide else None
    wanted = expected(x, y, limits, falls, wide, first, references, references_only)
    for device in ("cpu", "cuda"):
        with on_cpu():
            tiles = TileColumns(
                y, falls, (wide_y, wide_falls) if has_wide else None, device, references[1]
            )
            found = tiles.hits(
                x, limits, wide_x, wide_limits, first=first,
                references=references[0], references_only=references_only,
            )  # fmt: skip
        assert [side.dtype for side in found] == [np.int32, np.int32]
        assert sorted(zip(*(side.tolist() for side in found), strict=True)) == wanted, device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 9), (1024, 2048)])
def test_cuda_finds_what_the_processor_finds(m, n):
    rng = np.random.default_rng(m)
    x, y = (rng.integers(-127, 128, (count, 64), np.int8) for count in (m, n))
    falls, old = rng.integers(0, 9999, n).astype(np.int32), np.zeros(n, bool)
    how = {"first": native.EVERY_COLUMN, "references": np.zeros(m, bool), "references_only": False}
    limits, nothing = np.full(m, 50_000, np.int32), (x[:, :0], np.zeros(m, np.int32))
    found = [
        TileColumns(y, falls, None, device, old).hits(x, limits, *nothing, **how)
        for device in ("cpu", "cuda")
    ]
    one, other = (sorted(zip(*(s.tolist() for s in sides), strict=True)) for sides in found)
    assert one == other


def test_the_name_of_the_kernels_is_noted(kernels):
    assert kernel_name("cpu") == kernels
    assert kernel_name("cuda") == "cuda"
