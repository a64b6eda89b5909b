"""A plan as rows that anyone can check with a few lines of their own."""

from collections.abc import Iterator
from typing import Any

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.slices import local_ranks
from megatron_hbp.planning.core.tiers import Recompute


def plan_rows(plan: Plan) -> Iterator[dict[str, Any]]:
    """One dict per (step, micro-batch, CP gang), ready for JSON; `offsets` are sample starts in the pack, in tokens.

    `cp_local_rank` is, for each sample, the gang's rank that attends to it alone, null where ranks share it; null as a
    whole at CP degree 1. It holds for the tier's own layout, without tensor parallelism.
    """
    recompute = [_recompute(tier.recompute) for tier in plan.tiers]
    for index in range(plan.num_packs):
        pack = plan.pack(index)
        tier = plan.tiers[pack.tier]
        local = local_ranks(pack, tier).tolist() if tier.cp_degree > 1 else None
        yield {
            "step": pack.step,
            "micro_batch": pack.slot,
            "tier": pack.tier,
            "ranks": list(range(pack.rank0, pack.rank0 + tier.cp_degree)),
            "samples": pack.sample_ids.tolist(),
            "lengths": pack.lengths.tolist(),
            "offsets": pack.offsets.tolist(),
            "cp_local_rank": local and [None if rank < 0 else rank for rank in local],
            "capacity": tier.packing_length,
            "cp_degree": tier.cp_degree,
            "recompute": recompute[pack.tier],
        }


def _recompute(recompute: Recompute) -> dict[str, Any] | None:
    if recompute.granularity is None:
        return None
    return {
        "granularity": recompute.granularity,
        "layers": recompute.num_layers,
        "modules": list(recompute.modules),
    }
