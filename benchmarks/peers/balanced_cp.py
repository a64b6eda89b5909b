"""megatron-core's BalancedCPScheduler, straight from the installed wheel (released 0.19), on random global batches.

Source: megatron/core/pipeline_parallel/hybrid_cp_schedule.py, imported. `max_seq_len_per_rank` is our unit.

What it synchronises: the wheel runs one forward per sample, one after the other on each rank, and all ranks meet at a
barrier after each *group* of samples that the scheduler returns, not after each micro-batch. Inside a group ranks run
unequal numbers of samples. A lockstep plan would put a barrier behind every slot, so the plan says "gang"; the barriers
between the groups of a step (`plan.counts["groups"]` in all) are then not charged, which favours the peer.

Simplified, all in its favour: samples that one gang runs one after the other are packed (best fit, `packed=False` turns
it off and gives what the wheel really runs); gangs of a group trade places so that each starts at a multiple of its CP
degree; the re-routing of samples between ranks and the `.item()` per sample cost nothing.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.packing.best_fit import best_fit_decreasing
from megatron_hbp.planning.peers.common import UNIT, PlanWriter, least_degree, random_steps


def balanced_cp(
    lengths: np.ndarray,
    *,
    num_ranks: int,
    step_tokens: int,
    unit: int = UNIT,
    cost: CostModel,
    seed: int = 0,
    packed: bool = True,
) -> Plan:
    """Schedule every random step with the wheel's scheduler. Raises ConfigError unless ranks are a power of two.

    On other numbers of ranks the scheduler's filling of empty ranks runs past the last rank.
    """
    if num_ranks & (num_ranks - 1):
        raise ConfigError(f"BalancedCPScheduler fills a power of two of ranks only, not {num_ranks}")
    least_degree(lengths, unit, num_ranks)
    scheduler = BalancedCPScheduler(unit, SimpleNamespace(size=lambda: num_ranks))
    writer = PlanWriter(num_ranks, unit)
    num_groups = 0
    for step, ids in enumerate(random_steps(lengths, step_tokens, seed)):
        named = list(zip(ids.tolist(), lengths[ids].tolist(), strict=True))
        _, groups = scheduler.get_groups_and_subsamples(named, None)
        num_groups += len(groups)
        first_slot = 0
        for group in groups:
            first_slot = _write_group(writer, group, lengths, step, first_slot, packed)
    plan = writer.plan(lengths, schedule="gang", step_tokens=step_tokens, cost=cost, seed=seed)
    return replace(plan, counts={"groups": num_groups})


def _write_group(
    writer: PlanWriter, group: list[list[int]], lengths: np.ndarray, step: int, first_slot: int, packed: bool
) -> int:
    """Write one group, `group[rank]` being the samples of a rank in order; returns the slot of the next one."""
    gangs: dict[tuple[int, ...], int] = {}
    for samples in group:
        gangs[tuple(samples)] = gangs.get(tuple(samples), 0) + 1
    rank0 = last_slot = 0
    for samples, degree in sorted(gangs.items(), key=lambda gang: -gang[1]):
        ids = np.array(samples, np.int64)
        pack_of = best_fit_decreasing(lengths[ids], writer.unit * degree) if packed else np.arange(len(ids))
        num_packs = int(pack_of.max()) + 1
        for index in range(num_packs):
            writer.add(step=step, slot=first_slot + index, rank0=rank0, degree=degree, ids=ids[pack_of == index])
        rank0 += degree
        last_slot = max(last_slot, num_packs)
    return first_slot + last_slot
