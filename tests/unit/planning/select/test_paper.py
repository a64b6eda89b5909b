"""The paper's two stages on its own table."""

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.core.tiers import full_layers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.select.paper import TimedSetting, mean_length, memory_table, rows_of_cost, select_paper

COST = preset("llama3.1-8b-h100")
TABLE_19 = ((8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05))


def iteration(length, cp_degree, num_layers, seconds):
    """A row of table 19: an iteration is 16K tokens on every rank, whatever the tier."""
    pack = seconds * length / cp_degree / 16384
    return TimedSetting(length=length, cp_degree=cp_degree, recompute=full_layers(num_layers), seconds=pack)


def rows_19(seconds=None):
    times = seconds or [row[-1] for row in TABLE_19]
    return [iteration(1024 * length, cp, gc, one) for (length, cp, gc, _), one in zip(TABLE_19, times, strict=True)]


# Worked out by hand from section 3.3, l_max = 128K at CP 8: l_max / c = 16K.
@pytest.mark.parametrize(
    ("seconds", "tiers"),
    [
        # l_best = 16K at CP 1 = l_1 = l_2
        ((2.69, 2.65, 2.83, 3.01, 3.05), "16384:cp1:full28,131072:cp8:full28"),
        # l_best = 8K at CP 2, l_1 = 4K; l_2 = 16K lies above, and cannot fall to CP 1 behind CP 2
        ((2.65, 2.69, 2.83, 3.01, 3.05), "4096:cp1:full8,8192:cp2:full8,16384:cp2:full28,131072:cp8:full28"),
        # l_best = 32K at CP 8, l_1 = 4K; l_2 = 16K merges into 32K
        ((2.69, 2.83, 2.65, 3.01, 3.05), "4096:cp1:full8,32768:cp8:full8,131072:cp8:full28"),
        # l_best = 64K at CP 4, l_1 = 16K = l_2
        ((2.69, 3.01, 2.83, 2.65, 3.05), "16384:cp1:full28,65536:cp4:full28,131072:cp8:full28"),
        # l_best = l_max
        ((2.69, 3.01, 2.83, 3.05, 2.65), "16384:cp1:full28,131072:cp8:full28"),
    ],
)
def test_the_paper_on_table_19_and_permutations(seconds, tiers):
    assert select_paper(rows_19(seconds), 131072) == parse_tiers(tiers)
    assert select_paper(rows_19(seconds)[::-1], 100_000) == parse_tiers(tiers)


def test_the_paper_looks_no_further_than_the_longest_sample():
    assert select_paper(rows_19((9.0, 9.1, 9.2, 9.3, 1.0)), 20_000) == parse_tiers(
        "4096:cp1:full8,8192:cp2:full8,32768:cp8:full8"
    )


def test_stage_1_keeps_the_fastest_that_fits():
    fast = TimedSetting(length=16384, cp_degree=1, seconds=0.1, fits=False)
    slow = iteration(16384, 2, 0, 9.0)
    assert select_paper([*rows_19(), fast, slow], 131072) == parse_tiers("16384:cp1:full28,131072:cp8:full28")


def test_a_longer_tier_takes_the_degree_of_a_shorter_one():
    rows = [iteration(32768, 8, 8, 1.0), iteration(65536, 4, 28, 2.0)]
    found = select_paper(rows, 65536)
    assert [(tier.packing_length, tier.cp_degree) for tier in found] == [(4096, 1), (32768, 8), (65536, 8)]


def test_rows_of_the_cost_model_reproduce_its_table():
    rows = rows_of_cost(COST, [8192, 131072], degrees=(1, 8))
    assert [(r.length, r.cp_degree, r.recompute.num_layers, r.fits) for r in rows] == [
        (8192, 1, 23, True), (8192, 8, 0, True), (131072, 1, 0, False), (131072, 8, 28, True),
    ]  # fmt: skip
    assert rows[0].seconds == pytest.approx(
        COST.tier_cost(parse_tiers("8192:cp1:full23")[0]).seconds(8192, 8192**2)  # one sample a pack
    )
    assert memory_table(rows) == ((1024, 0), (8192, 23), (16384, 28))
    assert select_paper(rows_of_cost(COST, [8192, 16384, 131072], degrees=(1, 2, 8)), 131072)[-1] == rows[-1].tier


def test_packs_of_samples_like_those_given_cost_less_than_one_long_sample():
    lengths = np.array([100, 300, 9000])
    assert mean_length(lengths, 8192) == (100**2 + 300**2) / 400
    assert mean_length(lengths, 50) == 50 and mean_length(None, 8192) == 8192
    (row,) = rows_of_cost(COST, [8192], degrees=(1,), sample_lengths=lengths)
    assert row.seconds == pytest.approx(COST.tier_cost(row.tier).seconds(8192, 8192 * 250))


def test_errors():
    with pytest.raises(ConfigError, match="no rows"):
        select_paper([], 100)
    with pytest.raises(ConfigError, match="not even 16384 tokens on a rank"):
        select_paper([TimedSetting(length=131072, cp_degree=8, fits=False)], 100)
    with pytest.raises(ConfigError, match="holds the longest sample of 200000"):
        select_paper(rows_19(), 200_000)
    with pytest.raises(ConfigError, match="must divide"):
        TimedSetting(length=100, cp_degree=8, seconds=1.0)
    with pytest.raises(ConfigError, match="took some time"):
        TimedSetting(length=8192, cp_degree=8, seconds=float("nan"))
