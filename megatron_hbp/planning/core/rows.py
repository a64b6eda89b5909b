"""A plan as rows that anyone can check with a few lines of their own."""

from collections.abc import Iterator

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.slices import SHARED, cp_local_ranks
from megatron_hbp.planning.core.tiers import Pack, Recompute, Tier


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
            "cp_local_rank": _local(pack, tier),
            "capacity": tier.packing_length,
            "cp_degree": tier.cp_degree,
            "recompute": recompute[pack.tier],
        }


def _local(pack: Pack, tier: Tier) -> list[int | None] | None:
    """For each sample the gang's rank that holds it whole, null where ranks share it; null where there is one rank."""
    if tier.cp_degree == 1:
        return None
    return [None if rank == SHARED else rank for rank in cp_local_ranks(pack, tier).tolist()]


def _recompute(recompute: Recompute) -> dict | None:
    if recompute.granularity is None:
        return None
    return {
        "granularity": recompute.granularity,
        "layers": recompute.num_layers,
        "modules": list(recompute.modules),
    }
