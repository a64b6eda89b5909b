"""Long samples, packed tightly."""

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first
from megatron_hbp.planning.packing.best_fit import best_fit_decreasing, closest_fit

RNG = np.random.default_rng(0)


def test_long_samples_are_packed_as_tightly_as_by_best_fit():
    long = np.exp(RNG.uniform(np.log(16385), np.log(131072), 1500)).astype(np.int64)
    long = long[longest_first(long)]
    tight = closest_fit(long, len(long), 131072, 0)
    loads = np.bincount(tight, long)
    assert (tight >= 0).all() and loads.max() <= 131072
    assert len(loads) <= best_fit_decreasing(long, 131072).max() + 1


def test_best_fit_decreasing_equals_the_plain_form():
    lengths = RNG.integers(1, 60, 200)
    rooms: list[int] = []
    pack_of = np.empty(len(lengths), int)
    for sample in longest_first(lengths):
        fitting = [pack for pack, room in enumerate(rooms) if room >= lengths[sample]]
        pack = min(fitting, key=lambda pack: (rooms[pack], pack), default=len(rooms))
        if pack == len(rooms):
            rooms.append(100)
        rooms[pack] -= lengths[sample]
        pack_of[sample] = pack
    found = best_fit_decreasing(lengths, 100)
    np.testing.assert_array_equal(np.bincount(found, lengths), np.bincount(pack_of, lengths))
    assert sorted(np.bincount(found, lengths)) == sorted(100 - room for room in rooms)
