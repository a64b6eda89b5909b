"""A plan as rows that anyone can check with a few lines of their own."""

from collections.abc import Iterator

from megatron_hbp.planning.plan import Plan
from megatron_hbp.planning.types import Recompute


def plan_rows(plan: Plan) -> Iterator[dict]:
    """One dict per (step, micro-batch, CP gang), ready for JSON; `offsets` are sample starts in the pack, in tokens."""
    recompute = [_recompute(tier.recompute) for tier in plan.tiers]
    for index in range(plan.num_packs):
        pack = plan.pack(index)
        tier = plan.tiers[pack.tier]
        yield {
            "step": pack.step,
            "micro_batch": pack.slot,
            "tier": pack.tier,
            "ranks": list(range(pack.rank0, pack.rank0 + tier.cp_degree)),
            "samples": pack.sample_ids.tolist(),
            "lengths": pack.lengths.tolist(),
            "offsets": pack.offsets.tolist(),
            "cp_local_rank": None,
            "capacity": tier.packing_length,
            "cp_degree": tier.cp_degree,
            "recompute": recompute[pack.tier],
        }


def _recompute(recompute: Recompute) -> dict | None:
    if recompute.granularity is None:
        return None
    return {
        "granularity": recompute.granularity,
        "layers": recompute.num_layers,
        "modules": list(recompute.modules),
    }
