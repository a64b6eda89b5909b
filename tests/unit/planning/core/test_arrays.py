"""Array operations against their plain forms."""

import numpy as np
import pytest

from megatron_hbp.planning.core.arrays import longest_first, segment_sums, stable_order

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("limit", [10, 1 << 16, 1 << 20, 1 << 40])
def test_stable_order(limit):
    values = RNG.integers(0, limit, 5000)
    np.testing.assert_array_equal(stable_order(values), np.argsort(values, kind="stable"))


def test_longest_first_takes_equal_ones_from_the_last():
    assert longest_first(np.array([3, 9, 3, 9, 1])).tolist() == [3, 1, 2, 0, 4]


def test_sums_of_segments_that_may_be_empty():
    values, offsets = RNG.integers(0, 1 << 40, 20), np.array([0, 3, 3, 20])
    assert segment_sums(values, offsets).tolist() == [values[:3].sum(), 0, values[3:].sum()]
