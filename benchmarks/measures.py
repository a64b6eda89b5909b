"""Measures of a plan that only benchmarks report: robustness to noise, loss tokens per step."""

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import rank_grid


def noisy_step_ratio(plan: Plan, cost: CostModel, *, noise: float = 0.03, slow: float = 0.05, seed: int = 0) -> float:
    """P95 over micro-batches of wall over mean busy time under noise, relative to perfectly equal work.

    Every micro-batch takes up to `noise` more or less, one rank is `slow` slower throughout.
    """
    seconds = cost.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    busy = rank_grid(plan, seconds)
    busy = busy[busy.max(axis=1) > 0]
    rng = np.random.default_rng(seed)
    factor = 1 + rng.uniform(-noise, noise, busy.shape)
    factor[:, rng.integers(plan.num_ranks)] *= 1 + slow
    equal = np.repeat(busy.mean(axis=1, keepdims=True), plan.num_ranks, axis=1)
    found, ideal = (np.percentile((work * factor).max(axis=1) / work.mean(axis=1), 95) for work in (busy, equal))
    return float(found / ideal)


def loss_token_variation(plan: Plan, loss_tokens: np.ndarray) -> float:
    """Coefficient of variation of loss tokens per step; `loss_tokens` int [samples of the data]."""
    steps = np.repeat(plan.pack_step, np.diff(plan.pack_offsets))
    per_step = np.bincount(steps, loss_tokens[plan.sample_ids], plan.num_steps)
    return float(per_step.std() / per_step.mean())
