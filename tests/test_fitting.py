"""What a join fits to a sample: codes as wide as is cheapest, the same by any threads."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from snipdedup.search import fitting
from snipdedup.search.fitting import choose_projection, proposals
from snipdedup.search.projection import WIDTHS

ROWS = 1 << 20  # of the set that a sample stands for


def near_rows(dim, seed=0):
    """A sample of rows at cosine .8, which narrow codes take for .93."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.2
    rows = 0.775 * rng.standard_normal(dim) + spread * rng.standard_normal((1500, dim))
    return rows.astype(np.float32)


def test_each_code_counts_up_to_a_degree():
    """One code pairs with 20 others, each of which counts once; and one pair lies below."""
    codes = np.zeros((23, 4), np.int8)
    codes[:21] = 10
    a, b = np.append(np.zeros(20, int), 21), np.append(np.arange(1, 21), 22)
    assert proposals(codes, a, b, 400) == (20 + fitting.CROWDED_DEGREE) / 2
    assert proposals(codes, a, b, 401) == 0
    assert proposals(codes, a[:0], b[:0], 400) == 0


@pytest.mark.parametrize("free", ["proofs", "coordinates"])
def test_the_width_is_that_of_least_cost(free):
    sample = near_rows(400)
    costs = {"CODE_PRODUCTS": 0, "VISITING": 0}
    if free == "proofs":
        costs = {"PROPOSAL_PRODUCTS": 0}
    with (
        mock.patch.multiple(fitting, **costs),
        mock.patch.object(fitting, "list_count", return_value=1),
    ):
        width = choose_projection(sample, 0.95, 0, ROWS, 1).width
    assert width == WIDTHS[0] if free == "proofs" else width > WIDTHS[0]


def test_rows_of_few_dimensions_get_the_narrowest_codes():
    rng = np.random.default_rng(1)
    sample = (rng.standard_normal((3000, 20)) @ rng.standard_normal((20, 300))).astype("f4")
    assert choose_projection(sample, 0.95, 0, ROWS, 1).width == WIDTHS[0]


def test_small_sets_take_the_widest_without_a_look():
    assert choose_projection(near_rows(400), 0.9, 0, 1500, 1).width == WIDTHS[-1]


@pytest.mark.parametrize("least", [1 << 10, 1 << 13])
def test_threads_change_nothing(least):
    """Also where more rows are looked at than directions are found on."""
    sample = near_rows(96)
    with mock.patch.object(fitting, "DIRECTION_ROWS", least):
        one, two = (choose_projection(sample, 0.9, 3, ROWS, threads) for threads in (1, 2))
    assert one.width == two.width
    for name, array in one.arrays().items():
        assert np.array_equal(array, two.arrays()[name])
