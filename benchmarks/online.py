"""Plan data that arrives (streams, rollouts): one batch, one step, at once."""

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier, check_tiers
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.request import Request, occurrences
from megatron_hbp.planning.schedule.gang import place_step
from megatron_hbp.planning.schedule.placement import write_plan


def plan_batch(lengths: np.ndarray, *, tiers: tuple[Tier, ...], num_ranks: int, cost: CostModel) -> Plan:
    """One step of the gang schedule for a batch of `lengths` int [n]. Raises ConfigError and DataError.

    A sample that would outlast the step gets a higher CP degree, so offer tiers up to the number of ranks.
    """
    samples = Samples.of(lengths)
    check_tiers(tiers)
    request = Request(
        tiers=tiers, num_ranks=num_ranks, step_tokens=int(samples.lengths.sum()), schedule="gang", cost=cost
    )
    planned = occurrences(samples, request)
    packs, placement = place_step(planned.lengths, request)
    return write_plan(packs, planned, placement, request, samples)
