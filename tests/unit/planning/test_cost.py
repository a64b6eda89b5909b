"""The cost model and what is measured with it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import Recompute, Tier, make_plan, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import ATTENTION_ONLY, PRESETS, preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import lower_bound, noisy_step_ratio, side_by_side_abr
from megatron_hbp.planning.planner import naive_plan
from megatron_hbp.planning.request import Request

LLAMA = preset("llama3.1-8b-h100")


def test_seconds_of_one_pack_by_hand():
    (tier,) = parse_tiers("131072:cp8:full28")
    tokens, squares, again = 131072, 131072**2, 28 / 32
    linear = tokens / 8 * 6 * 7.5e9 * (3 + again) / 3 / 515e12
    attention = squares / 8 * 2 * 4096 * 32 * (3.5 + again) / 308e12
    exchange = tokens / 8 * 32 * 2 * (4096 + 1024 + 1024 + 4096) * (2 + again) * 7 / 8 / 129e9
    assert LLAMA.tier_cost(tier).seconds(tokens, squares) == pytest.approx(linear + attention + exchange + 0.188)


def test_time_falls_with_the_cp_degree_and_grows_with_recompute():
    seconds = [
        LLAMA.tier_cost(Tier(packing_length=65536, cp_degree=degree)).seconds(65536, 65536**2)
        for degree in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)
    plain, full = (
        LLAMA.tier_cost(Tier(packing_length=1024, recompute=r)).per_token
        for r in (Recompute(), Recompute(granularity="full", num_layers=32))
    )
    assert full == pytest.approx(plain * 4 / 3)


def test_selective_recompute_of_attention_adds_a_forward():
    plain, selective = (
        LLAMA.tier_cost(Tier(packing_length=1024, recompute=r))
        for r in (Recompute(), Recompute(granularity="selective", modules=("core_attn",)))
    )
    assert selective.per_square == pytest.approx(plain.per_square * 4.5 / 3.5)
    assert selective.per_token == plain.per_token


def test_crossing_nodes_costs_more():
    inside, outside = (LLAMA.tier_cost(Tier(packing_length=16384, cp_degree=c)).per_token * c for c in (8, 16))
    assert outside > inside


def test_recompute_that_fits():
    short, wide = (LLAMA.with_recompute(t) for t in parse_tiers("16384:cp1,131072:cp32"))
    assert (short.recompute.num_layers, wide.recompute.num_layers) == (28, 8)
    explicit = parse_tiers("16384:cp1:full5")[0]
    assert LLAMA.with_recompute(explicit) == explicit
    with pytest.raises(ConfigError, match="do not fit into memory"):
        LLAMA.with_recompute(parse_tiers("65536:cp1")[0])


def test_presets_have_names_and_unknown_ones_are_refused():
    assert {"llama3.1-8b-h100", "deepseek-v2-h100", "llama3.1-70b-h100-tp8", "qwen2.5-32b-h100-tp4"} == set(PRESETS)
    with pytest.raises(ConfigError, match="unknown cost model 'tpu'"):
        preset("tpu")


def test_no_plan_beats_the_lower_bound():
    lengths = generate("mix", num_samples=20_000)
    bound = lower_bound(lengths, LLAMA, 32, num_steps=1)
    tiers = tuple(LLAMA.with_recompute(t) for t in parse_tiers("16384:cp1,32768:cp2,65536:cp4,131072:cp8"))
    plan = make_plan(Samples.of(lengths), Request(tiers=tiers, num_ranks=32, step_tokens=524288))
    busy = LLAMA.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares) @ plan.pack_cp / 32
    assert bound < busy < 1.05 * bound


def test_the_lower_bound_counts_the_steps_there_are_and_the_degrees_allowed():
    cost = replace(LLAMA, step_seconds=2.0)
    lengths = np.r_[np.full(300, 16384), np.full(9, 3 * 16384)]
    plan = make_plan(
        Samples.of(lengths),
        Request(tiers=parse_tiers("16384:cp1:full28,49152:cp3:full28"), num_ranks=9, step_tokens=10**7),
    )
    epoch = plan_metrics(plan, cost).epoch_seconds
    bound = lower_bound(lengths, cost, 9, num_steps=plan.num_steps, degrees=(1, 3))
    assert bound < epoch < 1.3 * bound
    assert lower_bound(lengths, cost, 9, num_steps=100) > epoch


def test_full_packs_meet_the_lower_bound_with_all_that_a_micro_batch_costs():
    cost = replace(LLAMA, recompute_seconds=(("full", 4.0),), group_seconds=((2, 1.0),), recompute_layers=((8192, 8),))
    for length, tier in ((8192, "8192:cp1:full8"), (16384, "16384:cp2:full8")):
        lengths = np.full(16, length)
        plan = make_plan(
            Samples.of(lengths), Request(tiers=parse_tiers(tier), num_ranks=2, step_tokens=10**7, cost=cost)
        )
        bound = lower_bound(lengths, cost, 2, num_steps=1)
        assert plan_metrics(plan, cost).epoch_seconds == pytest.approx(bound)


def test_slots_of_dummies_take_time():
    plan = make_plan(
        Samples.of(np.full(64, 1024)), Request(tiers=parse_tiers("1024:cp1"), num_ranks=8, step_tokens=8192)
    )
    padded = make_plan(Samples.of(np.full(64, 1024)), Request(tiers=parse_tiers("1024:cp1"), num_ranks=8, step_tokens=8 * 8192, slot_multiple=10))  # fmt: skip
    assert (plan.num_micro_batches.sum(), padded.num_micro_batches.sum()) == (8, 10)
    more = plan_metrics(padded, LLAMA).epoch_seconds - plan_metrics(plan, LLAMA).epoch_seconds
    assert more == pytest.approx(2 * LLAMA.micro_batch_seconds)


def test_equal_work_is_the_yardstick_of_noise():
    plan = make_plan(
        Samples.of(np.full(64, 1024)), Request(tiers=parse_tiers("1024:cp1"), num_ranks=8, step_tokens=8192)
    )
    assert noisy_step_ratio(plan, LLAMA) == pytest.approx(1.0)


def test_naive_packing_is_as_unbalanced_as_in_the_paper():
    lengths = generate("mix", num_samples=200_000)
    tiers = parse_tiers("16384:cp1,131072:cp8")
    naive = naive_plan(Samples.of(lengths), Request(tiers=tiers, num_ranks=32, step_tokens=524288))
    assert side_by_side_abr(naive, 4, sort=False) == pytest.approx(0.506, abs=0.05)
    assert side_by_side_abr(naive, 4, sort=True) < 0.02


def test_attention_only_weighs_squares_over_cp():
    cost = ATTENTION_ONLY.tier_cost(Tier(packing_length=64, cp_degree=4))
    assert cost.fixed == cost.per_token == 0
    assert cost.per_square == pytest.approx(3.5 / 4)
