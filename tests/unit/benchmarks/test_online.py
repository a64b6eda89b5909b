"""A batch that arrives is planned at once."""

import numpy as np

from benchmarks.online import plan_batch
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics

COST = preset("llama3.1-8b-h100")


def test_a_batch_is_planned_at_once():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 1000, 900), rng.integers(1025, 8192, 40)])
    batch = np.random.default_rng(1).choice(lengths, 300)
    plan = plan_batch(batch, tiers=parse_tiers("1024:cp1,2048:cp2,8192:cp8"), num_ranks=8, cost=COST)
    plan.check()
    assert plan.num_steps == 1
    assert sorted(plan.sample_ids.tolist()) == list(range(300))
    assert plan_metrics(plan, COST).idle < 0.02
