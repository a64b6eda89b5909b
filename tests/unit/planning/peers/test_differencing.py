"""Karmarkar-Karp against plain definitions."""

import numpy as np
import pytest

from megatron_hbp.planning.peers.differencing import karmarkar_karp


def test_karmarkar_karp_on_the_textbook_example():
    costs = np.array([8.0, 7, 6, 5, 4])
    sums = np.bincount(karmarkar_karp(costs, 2), costs)
    assert sorted(sums.tolist()) == [14, 16]  # differencing gives a difference of 2 here, 0 is possible


@pytest.mark.parametrize("num_bins", [1, 2, 5, 9])
@pytest.mark.parametrize("num_items", [0, 1, 4, 200])
def test_karmarkar_karp_balances_sums_and_counts(num_bins, num_items):
    costs = np.random.default_rng(num_items).lognormal(size=num_items)
    for equal_counts in (False, True):
        bin_of = karmarkar_karp(costs, num_bins, equal_counts=equal_counts)
        assert bin_of.shape == (num_items,)
        assert num_items == 0 or 0 <= bin_of.min() <= bin_of.max() < num_bins
        counts = np.bincount(bin_of, minlength=num_bins)
        if equal_counts:
            assert counts.max() - counts.min() <= 1
        if num_items == 200:
            sums = np.bincount(bin_of, costs, num_bins)
            dealt = np.bincount(np.argsort(np.argsort(-costs)) % num_bins, costs, num_bins)
            # Equal counts bind the largest item to as many others as every bin has: compare with plain dealing.
            assert sums.max() <= (dealt.max() if equal_counts else 1.01 * max(sums.mean(), costs.max()))
