"""How good a plan is beyond the paper's measures: distance to the least possible time, randomness of order, noise.

`lower_bound` is what no plan can beat under a cost model; `randomness` says how far steps are from random draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Recompute, Tier, full_layers
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import rank_grid


def lower_bound(
    lengths: np.ndarray,
    cost: CostModel,
    num_ranks: int,
    *,
    num_steps: int,
    settings: Sequence[tuple[int, Recompute]] = (),
    degrees: Sequence[int] = (),
) -> float:
    """Seconds that an epoch takes at least: every sample at its cheapest setting, all work divided evenly.

    `settings` are the (local tokens, recompute) allowed, those of the cost model's profile without it, `degrees` the CP
    degrees, powers of two without it. A sample runs at the least degree that holds it; the fixed cost of a micro-batch
    is shared by its tokens, that of `num_steps` steps is added.
    """
    settings = settings or [(local, full_layers(count)) for local, count in cost.recompute_layers]
    best = np.full(len(lengths), np.inf)
    for local_tokens, recompute in settings:
        most = -(-int(lengths.max()) // local_tokens)
        known = np.array(sorted(degrees) or 1 << np.arange(most.bit_length() + 1))
        at = np.searchsorted(known * local_tokens, lengths)
        for index in np.unique(at[at < len(known)]):
            degree, here = int(known[index]), at == index
            tier = Tier(packing_length=local_tokens * degree, cp_degree=degree, recompute=recompute)
            coefficients = cost.tier_cost(tier)
            size = lengths[here].astype(float)
            gang_seconds = degree * (coefficients.per_token * size + coefficients.per_square * size**2)
            shared = size * coefficients.fixed / local_tokens
            best[here] = np.minimum(best[here], gang_seconds + shared)
    return float(best.sum() / num_ranks + num_steps * cost.step_seconds)


@dataclass(frozen=True, kw_only=True)
class Randomness:
    """How far the steps of a plan are from random draws."""

    eta_squared: float
    """Share of the variance of log-length that the step explains, net of what random steps of these sizes show."""
    trend: float
    """|Spearman correlation| of a step's index and its mean log-length."""


def randomness(plan: Plan) -> Randomness:
    """Measure the order of a plan; 0 is random, 1 is sorted."""
    steps = np.repeat(plan.pack_step, np.diff(plan.pack_offsets))
    logs = np.log(plan.lengths)
    sizes = np.bincount(steps, minlength=plan.num_steps)
    means = np.bincount(steps, logs, plan.num_steps) / sizes
    total = logs.var() * len(logs)
    if total == 0 or plan.num_steps < 2 or len(logs) == plan.num_steps:
        return Randomness(eta_squared=0.0, trend=0.0)
    between = float((sizes * (means - logs.mean()) ** 2).sum() / total)
    by_chance = (plan.num_steps - 1) / (len(logs) - 1)
    ranks = np.argsort(np.argsort(means, kind="stable"), kind="stable")
    trend = abs(float(np.corrcoef(ranks, np.arange(plan.num_steps))[0, 1])) if plan.num_steps > 2 else 0.0
    return Randomness(eta_squared=(between - by_chance) / (1 - by_chance), trend=trend)


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


def side_by_side_abr(plan: Plan, num_groups: int, *, sort: bool) -> float:
    """ABR of `num_groups` groups side by side, each as wide as the longest tier: a long pack, or as many short ones.

    Packs of a tier are taken in plan order, or sorted by summed squares; what does not fill an iteration is left out.
    The paper's tables fit 4 groups of 128K tokens.
    """
    rows = []
    for index, tier in enumerate(plan.tiers):
        per_group = plan.tiers[-1].packing_length // tier.packing_length
        squares = plan.pack_squares[plan.pack_tier == index].astype(float)
        squares = np.sort(squares) if sort else squares
        whole = len(squares) // (num_groups * per_group) * num_groups * per_group
        rows.append(squares[:whole].reshape(-1, num_groups, per_group).sum(axis=2))
    grid = np.concatenate(rows)
    return float((1 - grid.mean(axis=1) / grid.max(axis=1)).mean()) if len(grid) else 0.0
