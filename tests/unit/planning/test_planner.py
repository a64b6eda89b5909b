"""Plans of awkward data, and what options do."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.planning import Request, Samples, make_plan, naive_plan, parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import randomness
from megatron_hbp.planning.planner import naive_request, planners
from tests.unit.planning.plans import few_for_some
from tests.unit.planning.plans import plan_of as plan_on

COST = preset("llama3.1-8b-h100")
TIERS = "1024:cp1,8192:cp4"


def plan_of(lengths, tiers=TIERS, ranks=4, step_tokens=16384, **options):
    return plan_on(lengths, tiers, num_ranks=ranks, step_tokens=step_tokens, **options)


ADVERSARIAL = {
    "all equal": [300] * 100,
    "all longest": [8192] * 7,
    "all of the short tier": [1024] * 33,
    "just over half a pack": [513] * 50,
    "one sample": [5],
    "two samples": [5, 8000],
    "one token each": [1] * 9000,
    "fewer packs than ranks": [1000, 1000],
    "only long": [2000, 5000, 8192, 1025],
    "every boundary": [1023, 1024, 1025, 8191, 8192] * 5,
}


@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
@pytest.mark.parametrize("lengths", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
@pytest.mark.parametrize("with_loss_tokens", [False, True])
def test_adversarial_data_loses_nothing(lengths, schedule, with_loss_tokens):
    loss = few_for_some(np.array(lengths)) if with_loss_tokens else None
    plan = plan_of(lengths, schedule=schedule, loss_tokens=loss)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize(("ranks", "tiers"), [(6, "100:cp1,300:cp3,600:cp6"), (12, "64:cp1,256:cp4"), (7, "50:cp1")])
def test_ranks_and_degrees_that_are_no_powers_of_two(ranks, tiers):
    lengths = np.random.default_rng(1).integers(1, parse_tiers(tiers)[-1].packing_length + 1, 300)
    plan = plan_of(lengths, tiers, ranks, 3000)
    assert (plan.pack_rank0 % plan.pack_cp == 0).all()
    assert sorted(plan.sample_ids.tolist()) == list(range(300))


def test_overlong_samples():
    lengths = [100, 9000, 200, 10000]
    dropped = plan_of(lengths, overlong="drop")
    assert sorted(dropped.sample_ids.tolist()) == [0, 2]
    assert dropped.counts["dropped"] == 2 and dropped.counts["dropped_tokens"] == 19000
    cut = plan_of(lengths, overlong="truncate")
    assert sorted(cut.lengths.tolist()) == [100, 200, 8192, 8192]
    assert cut.counts["truncated"] == 2 and cut.counts["dropped_tokens"] == 9000 + 10000 - 2 * 8192


def test_tiny_plans_are_full_and_balanced():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 400, 600), rng.integers(1000, 8192, 40)])
    plan = plan_of(lengths)
    found = plan_metrics(plan, COST)
    assert 10 <= plan.num_steps <= 60
    assert found.pr < 0.02 and found.idle < 0.02


def test_real_sizes_are_full_balanced_and_random():
    lengths = generate("mix", num_samples=60_000)
    tiers = tuple(COST.with_recompute(t) for t in parse_tiers("16384:cp1,32768:cp2,65536:cp4,131072:cp8"))
    plan = plan_of(lengths, tiers, 32, 524288)
    found = plan_metrics(plan, COST)
    assert found.pr < 0.01
    assert found.idle < 0.025
    assert found.cr < 1.15 * found.forced_cr
    assert abs(randomness(plan).eta_squared) < 0.01


def test_every_slot_multiple_and_dummies_are_counted():
    lengths = np.random.default_rng(0).integers(20, 8000, 200)
    plan = plan_of(lengths, step_tokens=60000, slot_multiple=4)
    assert (plan.num_micro_batches % 4 == 0).all()
    used = np.arange(plan.max_micro_batches) < plan.num_micro_batches[:, None]
    assert plan.counts["dummies"] == (plan.grid[used] < 0).sum()


def test_curriculum_starts_with_the_short_tier_and_stays_random():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 400, 3000), rng.integers(1000, 8192, 60)])
    plan = plan_of(lengths, curriculum_steps=10)
    assert plan.pack_cp[plan.pack_step < 10].max() == 1
    assert plan.pack_cp[plan.pack_step >= 10].max() == 4
    early = [np.log(plan.lengths[plan.pack_offsets[p] : plan.pack_offsets[p + 1]]).mean() for p in range(40)]
    order = np.corrcoef(np.arange(40), early)[0, 1]
    assert abs(order) < 0.5  # no length order inside the prefix


def test_a_curriculum_longer_than_the_epoch_is_the_epoch():
    lengths = np.random.default_rng(0).integers(20, 8192, 50)
    plan = plan_of(lengths, curriculum_steps=10**18)
    assert sorted(plan.sample_ids.tolist()) == list(range(50))
    assert (np.diff(plan.pack_cp) >= 0).all()


def test_repeats_are_planned_as_often_as_asked():
    lengths = np.random.default_rng(0).integers(20, 2000, 50)
    repeats = np.arange(50) % 4
    plan = plan_of(lengths, repeats=repeats)
    np.testing.assert_array_equal(np.bincount(plan.sample_ids, minlength=50), repeats)


def test_steps_are_alike_in_content_where_a_length_ordered_packer_sorts_them():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 1000, 900), rng.integers(1025, 8192, 40)])
    common = {"tiers": "1024:cp1,2048:cp2,8192:cp8", "ranks": 8, "step_tokens": 8192}
    ordered, ours = plan_of(lengths, **common, packing="sorted"), plan_of(lengths, **common)
    assert randomness(ordered).eta_squared > 0.3 > 2 * randomness(ours).eta_squared
    assert randomness(ordered).trend < 0.3  # steps are shuffled at least


def test_hbp_beats_naive_packing():
    rng = np.random.default_rng(0)
    samples = Samples.of(np.concatenate([rng.integers(20, 1000, 900), rng.integers(1025, 8192, 40)]))
    request = Request(tiers=parse_tiers("1024:cp1,2048:cp2,8192:cp8"), num_ranks=32, step_tokens=16384)
    ours, naive = (plan_metrics(planner(samples, request), COST) for planner in (make_plan, naive_plan))
    assert ours.cr < 0.7 * naive.cr
    assert ours.epoch_seconds < naive.epoch_seconds


def test_naive_packing_knows_the_longest_tier_alone():
    request = Request(
        tiers=parse_tiers("1024:cp1,8192:cp8"), num_ranks=8, step_tokens=16384, seed=3, schedule="gang",
        curriculum_steps=5, slot_multiple=4, overlong="drop",
    )  # fmt: skip
    naive = naive_request(request)
    assert naive == replace(
        request, tiers=parse_tiers("8192:cp8"), packing="ISF", is_balanced=False, schedule="lockstep",
        curriculum_steps=0, slot_multiple=1,
    )  # fmt: skip
    plan = naive_plan(Samples.of(np.full(40, 900)), request)
    assert (plan.schedule, plan.tiers, plan.seed) == ("lockstep", naive.tiers, 3)


@pytest.mark.parametrize("name", planners())
def test_every_planner_of_ours_keeps_every_sample(name):
    lengths = np.random.default_rng(0).integers(20, 8192, 150)
    request = Request(tiers=parse_tiers(TIERS), num_ranks=4, step_tokens=16384, schedule="gang")
    plan = planners()[name](Samples.of(lengths), request)
    plan.check()
    assert sorted(plan.sample_ids.tolist()) == list(range(150))
    assert len(plan.tiers) == (1 if name.startswith("one tier") else 2)
    assert plan.schedule == ("gang" if name == "HBP, gang" else "lockstep")


def test_same_hash_from_fresh_processes_under_three_hash_seeds():
    code = (
        "import numpy as np; from megatron_hbp.planning import Request, Samples, make_plan, parse_tiers; "
        "samples = Samples.of(np.random.default_rng(5).integers(1, 8192, 400)); "
        "tiers = parse_tiers('1024:cp1:full2,8192:cp4:sel=mlp+core_attn'); "
        "print([make_plan(samples, Request(tiers=tiers, num_ranks=8, step_tokens=20000, schedule=s)).hash "
        "for s in ('lockstep', 'gang')])"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(hashes) == 1


def test_seed_changes_the_plan():
    lengths = np.random.default_rng(0).integers(20, 2000, 300)
    assert plan_of(lengths, seed=0).hash == plan_of(lengths, seed=0).hash != plan_of(lengths, seed=1).hash
