"""Filling the room left in packs, against the plain form."""

import numpy as np

from megatron_hbp.planning.packing.fill import best_fit, exact_fit, greedy_fill

RNG = np.random.default_rng(0)


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
