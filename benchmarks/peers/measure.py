"""What plans are compared by, beside `planning/measure/metrics.py`: the lower bound, randomness, waits inside gangs.

Lower bound of an epoch: every sample runs at its cheapest legal setting, a power of two of ranks that holds it with at
most so many tokens a rank as the recompute allows; its work is perfectly divisible over all ranks; the fixed cost of a
micro-batch is shared by a full rank's tokens; steps cost their fixed seconds. No plan can be faster; none with
whole samples and barriers reaches it.
"""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics, rank_grid, step_seconds


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table."""

    metrics: PlanMetrics
    schedule: str
    idle: float
    """Share of rank-seconds spent waiting at the barriers of the plan's schedule."""
    over_bound: float
    """Epoch seconds over the lower bound, barriers as in the plan's schedule."""
    over_bound_with_waits: float
    """The same where ranks of a gang also wait for one another before each pack; differs for "gang" only."""
    eta_squared: float
    planning_seconds: float


def compare(
    plan: Plan, cost: CostModel, unit: int, planning_seconds: float, joined: np.ndarray | None = None
) -> Comparison:
    """Measure a plan. `joined` bool [packs] are packs that share the forward of the slot before: no fixed cost."""
    seconds = cost.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    if joined is not None:
        seconds = seconds - cost.micro_batch_seconds * joined
    busy = rank_grid(plan, seconds)
    fixed = plan.num_steps * cost.step_seconds
    wall = step_seconds(plan, busy, least=cost.micro_batch_seconds).sum()
    waited = wall if plan.schedule == "lockstep" else wall_with_waits(plan, seconds)
    bound = lower_bound(plan.lengths, cost, num_ranks=plan.num_ranks, unit=unit, step_tokens=plan.step_tokens)
    return Comparison(
        metrics=plan_metrics(plan, cost),
        schedule=plan.schedule,
        idle=float(1 - busy.sum() / (wall * plan.num_ranks)),
        over_bound=float((wall + fixed) / bound),
        over_bound_with_waits=float((waited + fixed) / bound),
        eta_squared=eta_squared(plan),
        planning_seconds=planning_seconds,
    )


def lower_bound(lengths: np.ndarray, cost: CostModel, *, num_ranks: int, unit: int, step_tokens: int) -> float:
    """Seconds that an epoch over `lengths` int [n] cannot beat; see the head of this module."""
    lengths = lengths.astype(float)
    best = np.full(len(lengths), np.inf)
    for local_tokens, layers in cost.recompute_layers or ((unit, 0),):
        recompute = Recompute(granularity="full", num_layers=layers) if layers else Recompute()
        degree_of = 2 ** np.maximum(0, np.ceil(np.log2(lengths / local_tokens))).astype(np.int64)
        for degree in np.unique(degree_of).tolist():
            setting = Tier(packing_length=local_tokens * degree, cp_degree=degree, recompute=recompute)
            tier = cost.tier_cost(setting)
            here = degree_of == degree
            x = lengths[here]
            work = degree * (tier.per_token * x + tier.per_square * x * x) + tier.fixed * x / local_tokens
            best[here] = np.minimum(best[here], work)
    num_steps = int(np.ceil(lengths.sum() / step_tokens))
    return float(best.sum() / num_ranks + num_steps * cost.step_seconds)


def eta_squared(plan: Plan) -> float:
    """Share of the variance of log-length that the step explains, net of what random steps of these sizes would."""
    logs = np.log(plan.lengths.astype(float))
    step_of = np.repeat(plan.pack_step, np.diff(plan.pack_offsets))
    counts = np.bincount(step_of)
    used = counts > 0
    means = np.bincount(step_of, logs)[used] / counts[used]
    total = logs.var() * len(logs)
    if total == 0 or len(logs) < 2 or used.sum() >= len(logs):
        return 0.0
    between = float((counts[used] * (means - logs.mean()) ** 2).sum() / total)
    by_chance = (int(used.sum()) - 1) / (len(logs) - 1)
    return (between - by_chance) / (1 - by_chance)


def wall_with_waits(plan: Plan, seconds: np.ndarray) -> float:
    """Wall seconds where a pack starts when all of its ranks are free, and all ranks meet at the end of a step."""
    total, step = 0.0, -1
    free = np.zeros(plan.num_ranks)
    rows = zip(plan.pack_step.tolist(), plan.pack_rank0.tolist(), plan.pack_cp.tolist(), seconds.tolist(), strict=True)
    for pack_step, rank0, degree, pack_seconds in rows:
        if pack_step != step:
            total += float(free.max())
            free[:] = 0.0
            step = pack_step
        if degree == 1:
            free[rank0] += pack_seconds
        else:
            ranks = free[rank0 : rank0 + degree]
            ranks[:] = ranks.max() + pack_seconds
    return total + float(free.max())
