"""Tuned static CP: one packing length and one CP degree for everything, the best of all that fit.

Source: what Megatron-LM, NeMo and most SFT frameworks offer (`--context-parallel-size` with packed sequences), tuned as
a careful user would. Packing lengths are unit * 2^k from the first that holds the longest sample up to all ranks; each
is tried at every CP degree that fits memory and leaves a rank at least unit / 8 tokens (a higher degree needs less
recompute). Packs are ISF's in random order; the fastest setting by modelled epoch is packed again by best fit on
shuffled samples, and the better of the two packings wins. Every slot is a barrier: "lockstep".

The widest gang often wins under a cost model without a latency per hop: one pack over all ranks idles nobody. Degrees
end at the heads, or earlier at `max_degree`.

Simplified: best fit is tried on the best setting only; recompute is what the cost model says is needed.
"""

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.packing.methods import best_fit_shuffled, isf
from megatron_hbp.planning.peers.common import PlanWriter, cost_of, static_degree, unit_of
from megatron_hbp.planning.request import Request

LEAST_SHARE = 8
"""A rank holds at least unit / LEAST_SHARE tokens: below that kernels are too small for the rates of the model."""


def static_cp(samples: Samples, request: Request, *, max_degree: int | None = None) -> Plan:
    """The fastest single setting, by modelled epoch seconds. Raises DataError where nothing fits."""
    lengths, num_ranks, unit, cost = samples.lengths, request.num_ranks, unit_of(request), cost_of(request)
    best: tuple[float, Tier, Plan] | None = None
    length = unit * static_degree(lengths, unit, num_ranks)
    widest = max(min(max_degree or cost.model.attention.num_query_heads, num_ranks), length // unit)
    while length <= unit * widest:
        pack_of = isf(lengths, length, np.random.default_rng(request.seed))
        degree = length // unit
        while degree <= widest and num_ranks % degree == 0 and length // degree >= unit // LEAST_SHARE:
            tier = cost.with_recompute(Tier(packing_length=length, cp_degree=degree))
            plan = packed_plan(samples, pack_of, tier, request)
            seconds = plan_metrics(plan, cost).epoch_seconds
            if best is None or seconds < best[0]:
                best = seconds, tier, plan
            degree *= 2
        length *= 2
    assert best is not None, "static_degree divides the ranks"
    seconds, tier, plan = best
    pack_of = best_fit_shuffled(lengths, tier.packing_length, np.random.default_rng(request.seed))
    other = packed_plan(samples, pack_of, tier, request)
    return other if plan_metrics(other, cost).epoch_seconds < seconds else plan


def packed_plan(samples: Samples, pack_of: np.ndarray, tier: Tier, request: Request) -> Plan:
    """Packs of one tier in random order, side by side and one slot after the other: a lockstep Plan."""
    num_packs = int(pack_of.max()) + 1
    place = np.random.default_rng([request.seed, 1]).permutation(num_packs)[pack_of]
    by_pack = np.argsort(place, kind="stable")
    gangs = request.num_ranks // tier.cp_degree
    slots_per_step = max(1, round(request.step_tokens / (gangs * tier.packing_length)))
    writer = PlanWriter(request=request)
    for index, ids in enumerate(np.split(by_pack, np.cumsum(np.bincount(place))[:-1])):
        (step, slot), gang = divmod(index // gangs, slots_per_step), index % gangs
        writer.add(step=step, slot=slot, rank0=gang * tier.cp_degree, degree=tier.cp_degree, ids=ids)
    return writer.plan(samples, schedule="lockstep", tiers=(tier,))
