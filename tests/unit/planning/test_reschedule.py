"""Other ranks for what is left of a plan, and epochs in a row."""

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.reschedule import epoch_seed, join_epochs, mixture_repeats, reschedule
from tests.unit.planning.plans import plan_of

COST = preset("llama3.1-8b-h100")
RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(20, 1000, 900), RNG.integers(1025, 8192, 40)])


def planned(**options):
    return plan_of(LENGTHS, "1024:cp1,2048:cp2,8192:cp8", **{"num_ranks": 8, "step_tokens": 16384} | options)


def remaining(plan, step):
    return sorted(plan.sample_ids[plan.pack_offsets[np.searchsorted(plan.pack_step, step)] :].tolist())


def step_samples(plan, step):
    packs = np.flatnonzero(plan.pack_step == step)
    return sorted(np.concatenate([plan.pack(pack).sample_ids for pack in packs]).tolist())


@pytest.mark.parametrize("ranks", [8, 16, 24])
@pytest.mark.parametrize("from_step", [0, 7])
def test_another_number_of_ranks_runs_the_rest_once(ranks, from_step):
    plan = planned()
    changed = reschedule(plan, num_ranks=ranks, cost=COST, from_step=from_step)
    changed.check()
    assert sorted(changed.sample_ids.tolist()) == remaining(plan, from_step)
    for step in range(changed.num_steps):  # a step keeps its samples
        assert step_samples(changed, step) == step_samples(plan, step + from_step)
    used = np.arange(changed.max_micro_batches) < changed.num_micro_batches[:, None]
    assert changed.counts["dummies"] == (changed.grid[used] < 0).sum()
    assert (changed.num_ranks, changed.cost) == (ranks, plan.cost)


def test_mistakes():
    plan = planned()
    with pytest.raises(PlanError, match="outside the plan"):
        reschedule(plan, num_ranks=8, cost=COST, from_step=plan.num_steps)
    with pytest.raises(ConfigError, match="do not divide"):
        reschedule(plan, num_ranks=12, cost=COST)
    with pytest.raises(ConfigError, match="only lockstep"):
        reschedule(planned(schedule="gang"), num_ranks=8, cost=COST)


def test_epochs_run_one_after_the_other_in_orders_of_their_own():
    passes = [planned(seed=epoch_seed(0, epoch)) for epoch in range(3)]
    plan = join_epochs(passes)
    plan.check()
    np.testing.assert_array_equal(np.bincount(plan.sample_ids), 3)
    assert plan.num_steps == sum(one.num_steps for one in passes)
    assert plan.counts["dummies"] == sum(one.counts["dummies"] for one in passes)
    assert passes[0].hash == planned().hash != passes[1].hash
    with pytest.raises(PlanError, match="differ in num_ranks"):
        join_epochs([passes[0], planned(num_ranks=16)])


def test_mixture_repeats():
    source = np.repeat([0, 1, 2], [100, 50, 10])
    repeats = mixture_repeats(source, [1, 0.5, 2.3])
    assert [int(repeats[source == s].sum()) for s in range(3)] == [100, 25, 23]
    assert set(repeats[source == 2].tolist()) == {2, 3}
    with pytest.raises(ConfigError, match="weight -1 of source 0 is negative"):
        mixture_repeats(source, [-1])
