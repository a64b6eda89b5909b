"""Slots, steps, gangs, batches that arrive, other ranks, epochs."""

import numpy as np
import pytest

from benchmarks.online import plan_batch
from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.plan import DataFingerprint
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import randomness
from megatron_hbp.planning.packing.methods import METHODS
from megatron_hbp.planning.peers import PEERS
from megatron_hbp.planning.planner import naive_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.reschedule import epoch_seed, join_epochs, mixture_repeats, reschedule
from megatron_hbp.planning.schedule.placement import Request
from megatron_hbp.planning.schedule.slots import balanced_slots, steps_of_slots

COST = preset("llama3.1-8b-h100")
TIERS = parse_tiers("1024:cp1,2048:cp2,8192:cp8")
RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(20, 1000, 900), RNG.integers(1025, 8192, 40)])
COMMON = {"tiers": TIERS, "num_ranks": 8, "step_tokens": 16384}


def test_packs_of_like_time_run_side_by_side():
    seconds, widths = RNG.random(64), np.repeat([4, 2, 1], [4, 8, 52])
    slot, rank0 = balanced_slots(seconds, widths, 8)
    taken = {(s, rank) for s, r, w in zip(slot, rank0, widths, strict=True) for rank in range(r, r + w)}
    assert len(taken) == widths.sum()
    narrow = np.sort(seconds[widths == 1])
    spread = [np.ptp(seconds[slot == s]) for s in np.unique(slot)]
    assert np.mean(spread) < np.ptp(narrow) / 3


def test_steps_hold_what_was_asked_for():
    step, slot = steps_of_slots(np.full(40, 1024), np.ones(40, int), 4096, RNG)
    assert np.bincount(step).tolist() == [4] * 10
    assert sorted(zip(step.tolist(), slot.tolist(), strict=True)) == [(i // 4, i % 4) for i in range(40)]


def test_tier_ratio_is_even_over_time():
    width = np.repeat([1, 8], [300, 100])
    step, _ = steps_of_slots(np.full(400, 10), width, 80, np.random.default_rng(2))
    wide_per_step = np.bincount(step[width == 8], minlength=50)
    assert wide_per_step.min() >= 1 and wide_per_step.max() <= 3  # two on average


def test_steps_are_alike_in_content_where_a_length_ordered_packer_sorts_them():
    common = COMMON | {"step_tokens": 8192}
    ordered = make_plan(Samples.of(LENGTHS), Request(**common, packing=METHODS["sorted"], is_balanced=True))
    ours = make_plan(Samples.of(LENGTHS), Request(**common))
    assert randomness(ordered).eta_squared > 0.3 > 2 * randomness(ours).eta_squared
    assert randomness(ordered).trend < 0.3  # steps are shuffled at least


def test_gang_steps_are_balanced_and_random():
    plan = make_plan(Samples.of(LENGTHS), Request(**COMMON | {"step_tokens": 65536}, schedule="gang"))
    plan.check()
    assert plan_metrics(plan, COST).idle < 0.03
    assert abs(randomness(plan).eta_squared) < 0.02


def test_a_batch_is_planned_at_once():
    batch = np.random.default_rng(1).choice(LENGTHS, 300)
    plan = plan_batch(batch, tiers=TIERS, num_ranks=8, cost=COST)
    plan.check()
    assert plan.num_steps == 1
    assert sorted(plan.sample_ids.tolist()) == list(range(300))
    assert plan_metrics(plan, COST).idle < 0.02


def remaining(plan, step):
    return sorted(plan.sample_ids[plan.pack_offsets[np.searchsorted(plan.pack_step, step)] :].tolist())


@pytest.mark.parametrize("ranks", [8, 16, 24])
@pytest.mark.parametrize("from_step", [0, 7])
def test_another_number_of_ranks_runs_the_rest_once(ranks, from_step):
    plan = make_plan(Samples.of(LENGTHS), Request(**COMMON))
    changed = reschedule(plan, num_ranks=ranks, cost=COST, from_step=from_step)
    changed.check()
    assert sorted(changed.sample_ids.tolist()) == remaining(plan, from_step)
    for step in range(changed.num_steps):  # a step keeps its samples
        assert step_samples(changed, step) == step_samples(plan, step + from_step)


def step_samples(plan, step):
    packs = np.flatnonzero(plan.pack_step == step)
    return sorted(np.concatenate([plan.pack(pack).sample_ids for pack in packs]).tolist())


def test_rescheduling_mistakes():
    plan = make_plan(Samples.of(LENGTHS), Request(**COMMON))
    with pytest.raises(PlanError, match="outside the plan"):
        reschedule(plan, num_ranks=8, cost=COST, from_step=plan.num_steps)
    with pytest.raises(ConfigError, match="do not divide"):
        reschedule(plan, num_ranks=12, cost=COST)
    with pytest.raises(ConfigError, match="only lockstep"):
        reschedule(make_plan(Samples.of(LENGTHS), Request(**COMMON, schedule="gang")), num_ranks=8, cost=COST)


def test_epochs_run_one_after_the_other_in_orders_of_their_own():
    passes = [make_plan(Samples.of(LENGTHS), Request(**COMMON, seed=epoch_seed(0, epoch))) for epoch in range(3)]
    plan = join_epochs(passes)
    plan.check()
    np.testing.assert_array_equal(np.bincount(plan.sample_ids), 3)
    assert plan.num_steps == sum(one.num_steps for one in passes)
    assert passes[0].hash == make_plan(Samples.of(LENGTHS), Request(**COMMON)).hash != passes[1].hash
    with pytest.raises(PlanError, match="differ in num_ranks"):
        join_epochs([passes[0], make_plan(Samples.of(LENGTHS), Request(**COMMON | {"num_ranks": 16}))])


def test_mixture_repeats():
    source = np.repeat([0, 1, 2], [100, 50, 10])
    repeats = mixture_repeats(source, [1, 0.5, 2.3])
    assert [int(repeats[source == s].sum()) for s in range(3)] == [100, 25, 23]
    assert set(repeats[source == 2].tolist()) == {2, 3}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
def test_peers_plan_everything(name, schedule):
    request = Request(**COMMON, seed=0, schedule=schedule, cost=COST, data=DataFingerprint.of(LENGTHS))
    plan = PEERS[name](LENGTHS, request)
    plan.check()
    assert sorted(plan.sample_ids.tolist()) == list(range(len(LENGTHS)))


def test_hbp_beats_naive_packing():
    common = COMMON | {"num_ranks": 32}
    ours, naive = (plan_metrics(f(LENGTHS, **common), COST) for f in (make_plan, naive_plan))
    assert ours.cr < 0.7 * naive.cr
    assert ours.epoch_seconds < naive.epoch_seconds
