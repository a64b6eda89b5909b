"""Distance to the least possible epoch, randomness."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.planning import Samples, parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import lower_bound, side_by_side_abr
from megatron_hbp.planning.planner import naive_plan
from megatron_hbp.planning.request import Request
from tests.unit.planning.plans import plan_of

LLAMA = preset("llama3.1-8b-h100")


def test_no_plan_beats_the_lower_bound():
    lengths = generate("mix", num_samples=20_000)
    bound = lower_bound(lengths, LLAMA, 32, num_steps=1)
    tiers = tuple(LLAMA.with_recompute(t) for t in parse_tiers("16384:cp1,32768:cp2,65536:cp4,131072:cp8"))
    plan = plan_of(lengths, tiers, num_ranks=32, step_tokens=524288)
    busy = LLAMA.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares) @ plan.pack_cp / 32
    assert bound < busy < 1.05 * bound


def test_the_lower_bound_counts_the_steps_there_are_and_the_degrees_allowed():
    cost = replace(LLAMA, step_seconds=2.0)
    lengths = np.r_[np.full(300, 16384), np.full(9, 3 * 16384)]
    plan = plan_of(lengths, "16384:cp1:full28,49152:cp3:full28", num_ranks=9, step_tokens=10**7)
    epoch = plan_metrics(plan, cost).epoch_seconds
    bound = lower_bound(lengths, cost, 9, num_steps=plan.num_steps, degrees=(1, 3))
    assert bound < epoch < 1.3 * bound
    assert lower_bound(lengths, cost, 9, num_steps=100) > epoch


def test_full_packs_meet_the_lower_bound_with_all_that_a_micro_batch_costs():
    cost = replace(LLAMA, recompute_seconds=(("full", 4.0),), group_seconds=((2, 1.0),), recompute_layers=((8192, 8),))
    for length, tier in ((8192, "8192:cp1:full8"), (16384, "16384:cp2:full8")):
        lengths = np.full(16, length)
        plan = plan_of(lengths, tier, num_ranks=2, step_tokens=10**7, cost=cost)
        bound = lower_bound(lengths, cost, 2, num_steps=1)
        assert plan_metrics(plan, cost).epoch_seconds == pytest.approx(bound)


def test_naive_packing_is_as_unbalanced_as_in_the_paper():
    lengths = generate("mix", num_samples=200_000)
    tiers = parse_tiers("16384:cp1,131072:cp8")
    naive = naive_plan(Samples.of(lengths), Request(tiers=tiers, num_ranks=32, step_tokens=524288))
    assert side_by_side_abr(naive, 4, sort=False) == pytest.approx(0.506, abs=0.05)
    assert side_by_side_abr(naive, 4, sort=True) < 0.02
