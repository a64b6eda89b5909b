"""From a profile table to tiers: seconds carried over, what fits, selective recompute."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import Request, Samples
from megatron_hbp.planning.core.tiers import Recompute, full_layers
from megatron_hbp.planning.cost.fit import fit_profile
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.select.from_profile import profiled
from megatron_hbp.planning.select.joint import select_joint
from megatron_hbp.planning.select.paper import mean_length
from tests.unit.planning.profiles import GRID, PLANTED, profile_of, row_of, saved_by_attention, table_of

ATTENTION = Recompute(granularity="selective", modules=("core_attn",))
LENGTHS = np.concatenate([np.full(300, 100), np.full(40, 1500), np.full(3, 12000)])


def select(cost, space):
    return select_joint(Samples.of(LENGTHS), Request(num_ranks=4, step_tokens=65536, cost=cost), space)


def test_seconds_are_those_of_packs_of_these_samples():
    _, space = profiled(profile_of(), PLANTED, LENGTHS, 4)
    assert len(space.rows) == len({(s.tokens, s.cp_degree, s.recompute) for s in GRID}) and space.degrees == (1, 2, 4)
    for row in space.rows:
        expected = PLANTED.tier_cost(row.tier).seconds(row.length, row.length * mean_length(LENGTHS, row.length))
        assert row.seconds == pytest.approx(expected)  # rows of the planted model are carried over exactly


def test_without_a_limit_nothing_is_recomputed_and_no_more_fits_than_was_run():
    cost, space = profiled(profile_of(), PLANTED, LENGTHS, 4)
    assert cost.recompute_layers[-1] == (4096, 0) and space.selective == ((4096, ATTENTION),)
    assert cost.recompute_ranks == 0  # of this very layout: believed as it is
    chosen = select(cost, space)
    assert all(tier.recompute == Recompute() and tier.local_tokens <= 4096 for tier in chosen.tiers)


def test_another_models_cost_is_refused_and_memory_is_the_profiles_own():
    with pytest.raises(ConfigError, match="of a model of 4 layers, cost model llama"):
        profiled(profile_of(), preset("llama3.1-8b-h100"), LENGTHS, 4)
    generous = replace(PLANTED, recompute_layers=((131072, 0),))
    assert profiled(profile_of(), generous, LENGTHS, 4)[0].recompute_layers[-1][0] == 4096


def test_measured_degrees_are_kept_whatever_the_heads():
    """Six heads do not divide by four: keys and values are exchanged there, and were when it was measured."""
    ((count, layer),) = PLANTED.model.layers
    six = replace(layer, attention=replace(layer.attention, num_query_heads=6))
    cost = replace(PLANTED, model=replace(PLANTED.model, layers=((count, six),)))
    assert profiled(profile_of(), cost, LENGTHS, 4)[1].degrees == (1, 2, 4)
    assert profiled(profile_of(), cost, LENGTHS, 6)[1].degrees == (1, 2)


def test_what_was_seen_not_to_fit_is_not_chosen():
    _, space = profiled(profile_of(limit=2048 * 1100, bytes_of=saved_by_attention), PLANTED, LENGTHS, 4)
    assert space.selective == ((4096, ATTENTION),)  # 4,096 x 500 bytes fit, 4,096 x 800 with two layers do not
    refused = {(row.length // row.cp_degree, row.recompute) for row in space.rows if not row.fits}
    assert refused >= {(4096, full_layers(2))}
    _, less = profiled(profile_of(limit=4096 * 499, bytes_of=saved_by_attention), PLANTED, LENGTHS, 4)
    assert less.selective == ((2048, ATTENTION),)


def test_selective_recompute_is_chosen_where_it_is_the_cheapest_that_fits():
    one = profile_of(limit=4096 * 500, bytes_of=saved_by_attention)
    cost, space = profiled(one, fit_profile(one, name="fitted").cost, LENGTHS, 4)
    layered, chosen = select(cost, replace(space, selective=())), select(cost, space)
    assert any(tier.recompute == ATTENTION for tier in chosen.tiers)
    assert all(tier.recompute != ATTENTION for tier in layered.tiers)
    assert chosen.bound <= chosen.chosen.seconds <= layered.chosen.seconds


def test_ranks_that_no_measured_degree_divides():
    with pytest.raises(ConfigError, match="no CP degree of the profile divides 5 ranks"):
        profiled(table_of([row_of(s) for s in GRID if s.cp_degree > 1]), PLANTED, LENGTHS, 5)


def test_a_profile_in_which_nothing_fits():
    with pytest.raises(ConfigError, match="no setting of the profile fits into memory"):
        profiled(profile_of(limit=1, bytes_of=saved_by_attention), PLANTED, LENGTHS, 4)
