"""Packing methods: every sample once, within capacity, as full as they are known for."""

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.arrays import longest_first
from megatron_hbp.planning.packing.methods import METHODS, packing_method

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
    loads: list[int] = []
    pack_of = np.empty(len(lengths), int)
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


def test_a_method_goes_by_its_name_and_an_unknown_one_is_refused():
    assert packing_method("ISF") is METHODS["ISF"]
    with pytest.raises(ConfigError, match=r"unknown packing method 'zip'; there are balanced \(ours\), none, random"):
        packing_method("zip")
