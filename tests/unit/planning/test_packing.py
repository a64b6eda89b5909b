"""Packing methods, fills and the pieces they are made of."""

import numpy as np
import pytest

from megatron_hbp.planning.packing.best_fit import best_fit_decreasing, pack_tightly
from megatron_hbp.planning.packing.fill import best_fit, exact_fit, greedy_fill, longest_first, stable_order
from megatron_hbp.planning.packing.methods import METHODS

RNG = np.random.default_rng(0)
LENGTHS = np.clip(np.rint(np.exp(RNG.normal(5, 1, 2000))), 1, 4096).astype(np.int64)


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_every_sample_and_the_capacity(name):
    pack_of = METHODS[name](LENGTHS, 4096, np.random.default_rng(1))
    loads = np.bincount(pack_of, LENGTHS)
    assert len(pack_of) == len(LENGTHS)
    assert loads.min() > 0 and loads.max() <= 4096  # numbered without gaps, none too full


@pytest.mark.parametrize(("name", "padding"), [("ISF", 0.02), ("FFD", 0.005), ("BFS", 0.02), ("random", 0.1)])
def test_methods_pack_well(name, padding):
    loads = np.bincount(METHODS[name](LENGTHS, 4096, np.random.default_rng(1)), LENGTHS)
    assert 1 - loads.mean() / 4096 < padding


def naive_first_fit(lengths, capacity, order):
    loads, pack_of = [], np.empty(len(lengths), int)
    for sample in order:
        pack = next((p for p, load in enumerate(loads) if load + lengths[sample] <= capacity), len(loads))
        if pack == len(loads):
            loads.append(0)
        loads[pack] += lengths[sample]
        pack_of[sample] = pack
    return pack_of


def test_first_fit_decreasing_equals_the_plain_form():
    lengths = LENGTHS[:300]
    expected = naive_first_fit(lengths, 1024 * 4, longest_first(lengths))
    np.testing.assert_array_equal(METHODS["FFD"](lengths, 4096, RNG), expected)


def test_best_fit_takes_the_longest_unused_that_fits():
    room, lengths = RNG.integers(0, 60, 40), np.sort(RNG.integers(1, 60, 30))[::-1]
    chosen = best_fit(room, lengths)
    unused = list(range(len(lengths)))
    for gap in np.argsort(-room, kind="stable"):
        expected = next((index for index in unused if lengths[index] <= room[gap]), -1)
        assert chosen[gap] == expected
        if expected >= 0:
            unused = [index for index in unused if index > expected]


def test_exact_fit_pairs_equals_only_once():
    chosen = exact_fit(np.array([5, 3, 5, 9]), np.array([7, 5, 4, 3, 3]))
    assert chosen.tolist() == [1, 3, -1, -1]


def test_greedy_fill_leaves_no_gap_that_an_unused_sample_fits():
    room, lengths = RNG.integers(0, 500, 50), RNG.integers(1, 300, 200)
    gap_of = greedy_fill(room, lengths)
    used = gap_of >= 0
    left = room - np.bincount(gap_of[used], lengths[used], len(room))
    assert left.min() >= 0
    assert used.all() or left.max() < lengths[~used].min()


@pytest.mark.parametrize("limit", [10, 1 << 16, 1 << 20, 1 << 40])
def test_stable_order(limit):
    values = RNG.integers(0, limit, 5000)
    np.testing.assert_array_equal(stable_order(values), np.argsort(values, kind="stable"))


def test_long_samples_are_packed_as_tightly_as_by_best_fit():
    long = np.exp(RNG.uniform(np.log(16385), np.log(131072), 1500)).astype(np.int64)
    long = long[longest_first(long)]
    tight = pack_tightly(long, len(long), 131072, 0)
    loads = np.bincount(tight, long)
    assert (tight >= 0).all() and loads.max() <= 131072
    assert len(loads) <= best_fit_decreasing(long, 131072).max() + 1
