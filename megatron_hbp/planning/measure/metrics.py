"""The paper's measures of a plan (section 3.1), and modelled time.

An *iteration* is one slot of one step; N is the number of ranks side by side. A gang's ranks hold equal shares of its
pack; a rank without a pack holds nothing.
"""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel


@dataclass(frozen=True, kw_only=True)
class PlanMetrics:
    """Averages over the iterations of a plan; see `plan_metrics`."""

    num_ranks: int
    """N: the width that DBR and ABR are taken over."""
    num_steps: int
    num_packs: int
    dbr: float
    """Mean of (T_max - T_i) / T_max, T_i tokens of rank i."""
    abr: float
    """The same of A_i = sum of squared lengths on rank i."""
    pr: float
    """Padding over all token slots of the packs."""
    cr: float
    """Tokens in packs with CP degree > 1, over all."""
    forced_cr: float
    """Tokens of samples that fit no CP-1 tier, over all."""
    ave_t: float
    """Mean tokens of a rank in an iteration."""
    idle: float
    """Share of rank-seconds spent waiting at barriers, as modelled."""
    epoch_seconds: float
    """Modelled wall time of the plan."""


def plan_metrics(plan: Plan, cost: CostModel) -> PlanMetrics:
    """Measure `plan`; barriers are those of its schedule."""
    width = plan.pack_cp
    tokens, squares = plan.pack_tokens, plan.pack_squares
    token_grid = rank_grid(plan, tokens / width)
    seconds = cost.pack_seconds(plan.tiers, plan.pack_tier, tokens, squares)
    busy = rank_grid(plan, seconds)
    wall = step_seconds(plan, busy, least=cost.micro_batch_seconds)
    local = max((tier.packing_length for tier in plan.tiers if tier.cp_degree == 1), default=0)
    total = max(int(tokens.sum()), 1)
    return PlanMetrics(
        num_ranks=plan.num_ranks,
        num_steps=plan.num_steps,
        num_packs=plan.num_packs,
        dbr=imbalance(token_grid),
        abr=imbalance(rank_grid(plan, squares / width)),
        pr=float(1 - total / max(plan.pack_capacity.sum(), 1)),
        cr=float(tokens[width > 1].sum() / total),
        forced_cr=float(plan.lengths[plan.lengths > local].sum(dtype=np.int64) / total),
        ave_t=float(token_grid.mean()) if token_grid.size else 0.0,
        idle=max(0.0, float(1 - busy.sum() / max(wall.sum() * plan.num_ranks, 1e-30))),
        epoch_seconds=float(wall.sum() + plan.num_steps * cost.step_seconds),
    )


def rank_grid(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Spread per-pack `values` [packs] over ranks: float64 [iterations, ranks], 0 where a rank has no pack."""
    slots = plan.grid.reshape(-1, plan.num_ranks)
    used = (np.arange(plan.max_micro_batches) < plan.num_micro_batches[:, None]).reshape(-1)
    slots = slots[used]
    return np.where(slots >= 0, values[np.maximum(slots, 0)], 0.0)


def step_seconds(plan: Plan, busy: np.ndarray, *, least: float) -> np.ndarray:
    """Wall seconds of each step [steps] given `busy` [iterations, ranks]: a barrier per slot, or per step for gang.

    A slot takes `least` seconds where all ranks run dummies.
    """
    starts = np.cumsum(plan.num_micro_batches) - plan.num_micro_batches
    if plan.schedule == "gang":
        return np.add.reduceat(busy, starts, axis=0).max(axis=1)
    return np.add.reduceat(np.maximum(busy.max(axis=1), least), starts)


def imbalance(grid: np.ndarray) -> float:
    """Mean over rows of (max - mean) / max; rows [iterations, N] without any load do not count."""
    peak = grid.max(axis=1, initial=0)
    loaded = peak > 0
    return float((1 - grid[loaded].mean(axis=1) / peak[loaded]).mean()) if loaded.any() else 0.0
