"""Generated lengths meet the published facts."""

import numpy as np
import pytest

from benchmarks.lengths import GENERATORS, generate
from megatron_hbp.errors import ConfigError

K = 1024


def share_below(lengths, limit):
    return (lengths < limit).mean()


def test_tulu3():
    lengths = generate("tulu3")
    assert len(lengths) == 939_343
    assert lengths.mean() == pytest.approx(714, rel=0.05)
    assert (lengths > 2048).mean() == pytest.approx(0.05, abs=0.01)
    assert lengths.max() <= 32 * K


def test_longcite():
    lengths = generate("longcite")
    assert np.median(lengths) == pytest.approx(23.7 * K, rel=0.06)
    assert share_below(lengths, 8 * K) == pytest.approx(26 / 658, abs=0.005)
    assert lengths.max() < 128 * K


def test_longwriter():
    lengths = generate("longwriter")
    assert len(lengths) == 6000
    assert lengths.mean() == pytest.approx(5009, rel=0.03)
    assert lengths.std() == pytest.approx(2933, rel=0.05)
    assert 117 <= lengths.min() <= lengths.max() <= 30354


def test_openhermes():
    assert generate("openhermes").mean() == pytest.approx(390, rel=0.03)


@pytest.mark.parametrize(
    ("name", "quantiles", "longest"),
    [
        ("chatqa2", {K: 0.219, 4 * K: 0.315, 8 * K: 0.404, 32 * K: 0.999}, 99 * K),
        ("lmsys", {K: 0.871, 4 * K: 0.994}, 1600 * K),
    ],
)
def test_quantiles(name, quantiles, longest):
    lengths = generate(name)
    for limit, share in quantiles.items():
        assert share_below(lengths, limit) == pytest.approx(share, abs=0.004)
    assert lengths.max() <= longest


def test_same_seed_same_lengths():
    for name in GENERATORS:
        first, again = (generate(name, seed=3, num_samples=500) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, generate(name, seed=4, num_samples=500))


def test_unknown_name():
    with pytest.raises(ConfigError, match="unknown data set 'c4'"):
        generate("c4")
