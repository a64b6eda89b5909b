"""Gang steps: balanced, random, and samples on as many ranks as the step's time asks for."""

import numpy as np
import pytest

from megatron_hbp.planning import Request, parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import randomness
from megatron_hbp.planning.schedule.gang import draw_steps, place_step
from tests.unit.planning.plans import plan_of

COST = preset("llama3.1-8b-h100")
TIERS = parse_tiers("1024:cp1,2048:cp2,8192:cp8")
RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(20, 1000, 900), RNG.integers(1025, 8192, 40)])


def test_gang_steps_are_balanced_and_random():
    plan = plan_of(LENGTHS, TIERS, num_ranks=8, step_tokens=65536, schedule="gang")
    assert plan_metrics(plan, COST).idle < 0.03
    assert abs(randomness(plan).eta_squared) < 0.02


def test_every_step_draws_its_share_of_long_samples():
    request = Request(tiers=TIERS, num_ranks=8, step_tokens=65536)
    step_of = draw_steps(LENGTHS, request, np.random.default_rng(0))
    num_steps = round(LENGTHS.sum() / 65536)
    assert np.unique(step_of).tolist() == list(range(num_steps))
    long_per_step = np.bincount(step_of[LENGTHS > 1024], minlength=num_steps)
    assert np.ptp(long_per_step) <= 1
    assert np.bincount(step_of, LENGTHS) == pytest.approx(LENGTHS.sum() / num_steps, rel=0.05)


def test_a_sample_that_would_outlast_the_step_takes_more_ranks_than_memory_asks_for():
    request = Request(tiers=parse_tiers("16384:cp1,16392:cp8"), num_ranks=8, step_tokens=16384)
    alone, _ = place_step(np.array([16384]), request)
    assert alone.pack_tier.tolist() == [1]  # one rank would take eight times the mean of the step
    room, _ = place_step(np.full(80, 16384), request)
    assert room.pack_tier.max() == 0
