"""Plans of awkward data, and what options do."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import loss_token_variation, randomness
from megatron_hbp.planning.packing.hierarchical import group_data
from megatron_hbp.planning.request import Request

COST = preset("llama3.1-8b-h100")
TIERS = parse_tiers("1024:cp1,8192:cp4")


def plan_of(lengths, tiers=TIERS, ranks=4, step_tokens=16384, **options):
    plan = make_plan(
        Samples.of(np.asarray(lengths)), Request(tiers=tiers, num_ranks=ranks, step_tokens=step_tokens, **options)
    )
    plan.check()
    return plan


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
def test_adversarial_data_loses_nothing(lengths, schedule):
    plan = plan_of(lengths, schedule=schedule)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize(("ranks", "tiers"), [(6, "100:cp1,300:cp3,600:cp6"), (12, "64:cp1,256:cp4"), (7, "50:cp1")])
def test_ranks_and_degrees_that_are_no_powers_of_two(ranks, tiers):
    lengths = np.random.default_rng(1).integers(1, parse_tiers(tiers)[-1].packing_length + 1, 300)
    plan = plan_of(lengths, tiers=parse_tiers(tiers), ranks=ranks, step_tokens=3000)
    assert (plan.pack_rank0 % plan.pack_cp == 0).all()
    assert sorted(plan.sample_ids.tolist()) == list(range(300))


def test_a_boundary_belongs_to_the_lower_tier():
    assert group_data(np.array([1, 1023, 1024, 1025, 8191, 8192]), TIERS).tolist() == [0, 0, 0, 1, 1, 1]
    assert plan_of([1024] * 4).pack_cp.tolist() == [1] * 4
    assert plan_of([1025]).pack_cp.tolist() == [4]


def test_overlong_samples():
    lengths = [100, 9000, 200, 10000]
    with pytest.raises(DataError, match=r"2 samples are longer .* the first is sample 1 with 9000"):
        plan_of(lengths)
    dropped = plan_of(lengths, overlong="drop")
    assert sorted(dropped.sample_ids.tolist()) == [0, 2]
    assert dropped.counts["dropped"] == 2 and dropped.counts["dropped_tokens"] == 19000
    cut = plan_of(lengths, overlong="truncate")
    assert sorted(cut.lengths.tolist()) == [100, 200, 8192, 8192]
    assert cut.counts["truncated"] == 2 and cut.counts["dropped_tokens"] == 9000 + 10000 - 2 * 8192


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ([], {}, DataError, "no samples"),
        ([3, 0, 5], {}, DataError, "sample 1 has length 0"),
        ([1.5], {}, DataError, "whole numbers"),
        ([[1]], {}, DataError, "whole numbers"),
        ([9000], {"overlong": "drop"}, DataError, "nothing is left"),
        ([5], {"ranks": 6}, ConfigError, "6 ranks do not divide into gangs of 4"),
        ([5], {"ranks": 0}, ConfigError, "at least 1"),
        ([5], {"schedule": "chaos"}, ConfigError, "unknown schedule"),
        ([5], {"loss_tokens": np.array([1, 2])}, DataError, "loss_tokens has shape"),
    ],
)
def test_mistakes_are_named(lengths, options, error, message):
    with pytest.raises(error, match=message):
        plan_of(np.array(lengths, dtype=None if lengths else int), **options)


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
    plan = plan_of(lengths, tiers=tiers, ranks=32, step_tokens=524288)
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


def test_repeats_are_planned_as_often_as_asked():
    lengths = np.random.default_rng(0).integers(20, 2000, 50)
    repeats = np.arange(50) % 4
    plan = plan_of(lengths, repeats=repeats)
    np.testing.assert_array_equal(np.bincount(plan.sample_ids, minlength=50), repeats)


def test_loss_tokens_even_out():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 900, 20000)
    loss = few_for_some(lengths)
    tiers = parse_tiers("16384:cp1")
    blind = plan_of(lengths, tiers=tiers, ranks=4, step_tokens=65536)
    aware = plan_of(lengths, tiers=tiers, ranks=4, step_tokens=65536, loss_tokens=loss)
    full = np.bincount(aware.pack_step, aware.pack_tokens) > 60000  # one step of 140 is what is left
    assert loss_per_step(aware, loss)[full].std() < 0.4 * loss_per_step(blind, loss)[full].std()
    assert loss_token_variation(aware, loss) < 0.85 * loss_token_variation(blind, loss)
    assert plan_metrics(aware, COST) == plan_metrics(blind, COST)  # equals traded places
    for step in range(aware.num_steps):
        np.testing.assert_array_equal(lengths_of_step(aware, step), lengths_of_step(blind, step))


def lengths_of_step(plan, step):
    return np.sort(plan.lengths[np.repeat(plan.pack_step, np.diff(plan.pack_offsets)) == step])


def few_for_some(lengths):
    """Loss tokens: three samples in ten are short answers to long prompts."""
    few = np.random.default_rng(7).random(len(lengths)) < 0.3
    return np.where(few, lengths // 20 + 1, lengths)


def test_loss_tokens_even_out_where_few_long_samples_make_a_step():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([generate("mix", num_samples=30_000), rng.integers(16385, 131073, 800)])
    loss = few_for_some(lengths)
    tiers = tuple(COST.with_recompute(t) for t in parse_tiers("16384:cp1,32768:cp2,65536:cp4,131072:cp8"))
    options = {"tiers": tiers, "ranks": 32, "step_tokens": 524288}
    blind, aware = plan_of(lengths, **options), plan_of(lengths, **options, loss_tokens=loss)
    assert sorted(aware.sample_ids.tolist()) == list(range(len(lengths)))
    wide_steps = np.unique(blind.pack_step[blind.pack_cp == 8])
    variations = [loss_per_step(plan, loss)[wide_steps].std() for plan in (blind, aware)]
    assert variations[1] < 0.7 * variations[0]
    before, after = plan_metrics(blind, COST), plan_metrics(aware, COST)
    assert after.idle < before.idle + 1e-3
    assert after.pr < before.pr + 1e-4 and after.cr < 1.01 * before.cr
    assert abs(randomness(aware).eta_squared) < 0.01


def loss_per_step(plan, loss):
    steps = np.repeat(plan.pack_step, np.diff(plan.pack_offsets))
    return np.bincount(steps, loss[plan.sample_ids], plan.num_steps)


@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
@pytest.mark.parametrize("lengths", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_adversarial_data_with_loss_tokens_loses_nothing(lengths, schedule):
    loss = few_for_some(np.array(lengths))
    plan = plan_of(lengths, schedule=schedule, loss_tokens=loss)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))


def test_same_hash_from_fresh_processes_under_three_hash_seeds():
    code = (
        "import numpy as np; from megatron_hbp.planning import make_plan, parse_tiers; "
        "lengths = np.random.default_rng(5).integers(1, 8192, 400); "
        "tiers = parse_tiers('1024:cp1:full2,8192:cp4:sel=mlp+core_attn'); "
        "print([make_plan(lengths, tiers=tiers, num_ranks=8, step_tokens=20000, schedule=s).hash "
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


def test_data_dealt_in_parts_is_whole(monkeypatch):
    monkeypatch.setattr("megatron_hbp.planning.packing.hierarchical._PART_SAMPLES", 1000)
    monkeypatch.setattr("megatron_hbp.planning.packing.hierarchical._TIGHT_SAMPLES", 20)
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 400, 7500), rng.integers(1025, 8192, 70)])
    plan = plan_of(lengths)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))
    assert plan_metrics(plan, COST).pr < 0.02
