"""Plan data that arrives (streams, rollouts): one batch, one step, at once."""

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Tier, check_tiers
from megatron_hbp.planning.cost.model import DEFAULT_COST_MODEL, CostModel, preset
from megatron_hbp.planning.planner import check_lengths, check_ranks, settle
from megatron_hbp.planning.schedule.gang import place_step
from megatron_hbp.planning.schedule.placement import Request, write_plan


def plan_batch(lengths: np.ndarray, *, tiers: tuple[Tier, ...], num_ranks: int, cost: CostModel | None = None) -> Plan:
    """One step of the gang schedule for a batch of `lengths` int [n]. Raises ConfigError and DataError.

    A sample that would outlast the step gets a higher CP degree, so offer tiers up to the number of ranks.
    """
    lengths = check_lengths(lengths)
    check_tiers(tiers)
    check_ranks(tiers, num_ranks, int(lengths.sum()))
    request = Request(
        tiers=tiers, num_ranks=num_ranks, step_tokens=int(lengths.sum()), seed=0, schedule="gang",
        cost=cost or preset(DEFAULT_COST_MODEL), data=DataFingerprint.of(lengths),
    )  # fmt: skip
    occurrences, counts = settle(lengths, None, None, tiers[-1].packing_length, "error")
    packs, placement = place_step(lengths, request)
    return write_plan(packs, occurrences, placement, request, counts)
