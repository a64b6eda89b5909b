"""Steps alike in loss tokens, by swaps that change nothing else."""

from typing import Any

import numpy as np

from benchmarks.lengths import generate
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import randomness
from tests.unit.planning.plans import few_for_some, plan_of

COST = preset("llama3.1-8b-h100")


def loss_per_step(plan, loss):
    steps = np.repeat(plan.pack_step, np.diff(plan.pack_offsets))
    return np.bincount(steps, loss[plan.sample_ids], plan.num_steps)


def lengths_of_step(plan, step):
    return np.sort(plan.lengths[np.repeat(plan.pack_step, np.diff(plan.pack_offsets)) == step])


def test_loss_tokens_even_out():
    lengths = np.random.default_rng(0).integers(20, 900, 20000)
    loss = few_for_some(lengths)
    options: dict[str, Any] = {"num_ranks": 4, "step_tokens": 65536}
    blind = plan_of(lengths, "16384:cp1", **options)
    aware = plan_of(lengths, "16384:cp1", **options, loss_tokens=loss)
    full = np.bincount(aware.pack_step, aware.pack_tokens) > 60000  # one step of 140 is what is left
    assert loss_per_step(aware, loss)[full].std() < 0.4 * loss_per_step(blind, loss)[full].std()
    assert loss_per_step(aware, loss).std() < 0.85 * loss_per_step(blind, loss).std()  # of the same number of steps
    assert plan_metrics(aware, COST) == plan_metrics(blind, COST)  # equals traded places
    for step in range(aware.num_steps):
        np.testing.assert_array_equal(lengths_of_step(aware, step), lengths_of_step(blind, step))


def test_loss_tokens_even_out_where_few_long_samples_make_a_step():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([generate("mix", num_samples=30_000), rng.integers(16385, 131073, 800)])
    loss = few_for_some(lengths)
    tiers = tuple(COST.with_recompute(t) for t in parse_tiers("16384:cp1,32768:cp2,65536:cp4,131072:cp8"))
    options: dict[str, Any] = {"tiers": tiers, "num_ranks": 32, "step_tokens": 524288}
    blind, aware = plan_of(lengths, **options), plan_of(lengths, **options, loss_tokens=loss)
    assert sorted(aware.sample_ids.tolist()) == list(range(len(lengths)))
    wide_steps = np.unique(blind.pack_step[blind.pack_cp == 8])
    variations = [loss_per_step(plan, loss)[wide_steps].std() for plan in (blind, aware)]
    assert variations[1] < 0.7 * variations[0]
    before, after = plan_metrics(blind, COST), plan_metrics(aware, COST)
    assert after.idle < before.idle + 1e-3
    assert after.pr < before.pr + 1e-4 and after.cr < 1.01 * before.cr
    assert abs(randomness(aware).eta_squared) < 0.01
