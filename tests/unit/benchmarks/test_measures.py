"""Measures that only benchmarks report."""

import numpy as np
import pytest

from benchmarks.measures import loss_token_variation, noisy_step_ratio
from megatron_hbp.planning.cost.presets import preset
from tests.unit.planning.plans import few_for_some, plan_of

LLAMA = preset("llama3.1-8b-h100")


def test_equal_work_is_the_yardstick_of_noise():
    plan = plan_of(np.full(64, 1024), "1024:cp1", num_ranks=8, step_tokens=8192)
    assert noisy_step_ratio(plan, LLAMA) == pytest.approx(1.0)
    lengths = np.arange(1, 65) * 16
    uneven = plan_of(lengths, "1024:cp1", num_ranks=8, step_tokens=8192, packing="none", is_balanced=False)
    assert noisy_step_ratio(uneven, LLAMA) > 1.0


def test_variation_of_loss_tokens_by_hand():
    lengths = np.random.default_rng(0).integers(20, 900, 500)
    loss = few_for_some(lengths)
    plan = plan_of(lengths, "1024:cp1", num_ranks=2, step_tokens=8192)
    steps = [0.0] * plan.num_steps
    for pack in range(plan.num_packs):
        steps[plan.pack_step[pack]] += loss[plan.pack(pack).sample_ids].sum()
    assert loss_token_variation(plan, loss) == pytest.approx(np.std(steps) / np.mean(steps))
