"""Every kernel computes what it says on codes of any shape, and one that lies is never used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.join import kernels
from snipdedup.join.kernels import (
    Kernel,
    all_close,
    candidates,
    hit_places,
    pick_kernel,
    product_hits,
    trial,
)

KERNELS = {kernel.name: kernel for kernel in candidates("cpu")}
WORKING = {name: kernel for name, kernel in KERNELS.items() if trial(kernel, 256) is not None}


def products(kernel, x, y):
    columns = kernel.prepare(torch.from_numpy(y))
    return kernel.multiply(torch.from_numpy(x), columns).double().numpy()


def test_float32_works_everywhere():
    assert "float32" in WORKING
    assert list(KERNELS)[-1] == "float32"


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 2048), (7, 3), (17, 1), (1024, 2048), (300, 33)])
@pytest.mark.parametrize("width", [256, 128, 32])
def test_products_are_those_of_integers(name, m, n, width):
    if name not in WORKING:
        pytest.skip(f"{name} does not run on this processor")
    rng = np.random.default_rng(m + n)
    x, y = (rng.integers(-127, 128, (count, width), np.int8) for count in (m, n))
    x[0], y[0], x[-1] = 127, 127, -127
    found = products(KERNELS[name], x, y)
    assert np.array_equal(found, x.astype(np.int64) @ y.T.astype(np.int64))


@pytest.mark.parametrize("name", list(KERNELS))
@settings(max_examples=30)
@given(value=st.integers(-127, 127), other=st.integers(-127, 127), at=st.integers(0, 255))
def test_exact_kernels_are_exact_on_extreme_codes(name, value, other, at):
    if name not in WORKING:
        pytest.skip(f"{name} does not run on this processor")
    x, y = np.full((5, 256), value, np.int8), np.full((3, 256), other, np.int8)
    x[1, at], y[2, at] = 127, -127
    true = x.astype(np.int64) @ y.T.astype(np.int64)
    assert np.array_equal(products(KERNELS[name], x, y), true)


def fake(name, change=lambda products: products):
    """A float32 kernel that tampers with its products."""
    single = KERNELS["float32"]
    return Kernel(name, "cpu", single.prepare, lambda x, y: change(single.multiply(x, y)))


def off_by_one(products):
    products[3, 5] += 1
    return products


def fail(error):
    def multiply(products):
        raise error

    return multiply


@pytest.mark.parametrize(
    "change",
    [
        off_by_one,
        lambda products: products * 0,
        lambda products: products * float("nan"),
        lambda products: products.bfloat16().float(),
        lambda products: products[:, :-1],
        fail(RuntimeError("not compiled")),
        fail(NotImplementedError("no")),
        fail(AttributeError("no _int_mm")),
    ],
    ids=[
        "off by one",
        "zeros",
        "NaN",
        "rounded",
        "one column short",
        "runtime",
        "unimplemented",
        "attribute",
    ],
)
def test_a_kernel_that_lies_or_fails_has_no_time(change):
    assert trial(fake("liar", change), 256) is None
    assert trial(fake("right"), 256) > 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 1.0, 1.0), "first"),
        ((1.0, 0.7, 0.9), "first"),  # not clearly faster
        ((1.0, 0.6, 0.5), "second"),
        ((1.0, 0.6, 0.3), "third"),
        ((None, 2.0, 1.0), "third"),
        ((None, 2.0, None), "second"),
        ((None, None, None), "third"),
    ],
)
def test_the_fastest_that_is_right_is_taken_and_the_last_if_none_is(monkeypatch, seconds, expected):
    times = dict(zip(("first", "second", "third"), seconds, strict=True))
    monkeypatch.setattr(kernels, "candidates", lambda device: [fake(name) for name in times])
    monkeypatch.setattr(kernels, "trial", lambda kernel, width: times[kernel.name])
    assert kernels._picked.__wrapped__("cpu").name == expected


def test_the_picked_kernel_is_right():
    assert trial(pick_kernel("cpu"), 256) is not None


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 20),
    n=st.one_of(st.integers(0, 20), st.integers(60, 200)),
    dtype=st.sampled_from([torch.int32, torch.float32]),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 0.999]),
)
def test_hits_are_the_products_that_reach_their_rows_limit(seed, m, n, dtype, fraction):
    rng = np.random.default_rng(seed)
    table = rng.integers(-40, 40, (m, n))
    limits = rng.integers(-45, 45, m) + fraction  # whole ones are reached, not passed
    limits[rng.random(m) < 0.2] = -1e6  # rows outside the sample
    limits[rng.random(m) < 0.2] = 1e6
    products = torch.from_numpy(table).to(dtype)
    expected = table >= limits[:, None]
    hits = product_hits(products, limits, 1.0)
    for i, j in (hits.places(), hit_places(products, limits)):
        places = sorted(zip(i.tolist(), j.tolist(), strict=True))
        assert places == list(zip(*map(np.ndarray.tolist, np.nonzero(expected)), strict=True))
        assert i.tolist() == sorted(i.tolist())
    assert hits.total == expected.sum()
    assert (product_hits(products, limits, 0.0) is None) == expected.any()
    np.testing.assert_array_equal(all_close(products, limits), expected)
