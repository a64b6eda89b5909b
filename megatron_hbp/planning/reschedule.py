"""The same packs on another number of ranks, and several epochs in a row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.request import check_ranks
from megatron_hbp.planning.schedule.slots import balanced_slots

MAX_EPOCHS = 1000
"""A plan lists every occurrence: a thousand epochs of a million samples are 12 GB."""


def reschedule(plan: Plan, *, num_ranks: int, cost: CostModel, from_step: int = 0, slot_multiple: int = 1) -> Plan:
    """What is left of `plan` from `from_step` on, for `num_ranks` ranks: same packs, same steps, other slots and ranks.

    Each sample that has not run yet runs exactly once; step 0 of the new plan is `from_step` of the old one. Raises
    PlanError for a step outside the plan, ConfigError for ranks that the tiers do not divide. On more ranks than
    before, steps that no longer fill a slot leave ranks idle (counted as dummies): a larger step would change training.
    Steps get a multiple of `slot_multiple` slots.
    """
    if not 0 <= from_step < plan.num_steps:
        raise PlanError(f"step {from_step} is outside the plan, which has {plan.num_steps} steps")
    if plan.schedule != "lockstep":
        raise ConfigError("only lockstep plans can be laid out for other ranks; make a gang plan anew")
    check_ranks(plan.tiers, num_ranks)
    packs = np.arange(np.searchsorted(plan.pack_step, from_step), plan.num_packs)
    seconds = cost.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    step = plan.pack_step[packs] - from_step
    slot, rank0 = np.empty(len(step), np.int64), np.empty(len(step), np.int64)
    counts = np.zeros(plan.num_steps - from_step, np.int64)
    ends = np.searchsorted(step, np.arange(len(counts)), "right")
    for index, (start, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
        here = packs[start:end]
        slot[start:end], rank0[start:end] = balanced_slots(seconds[here], plan.pack_cp[here], num_ranks)
        counts[index] = -(-(slot[start:end].max() + 1) // slot_multiple) * slot_multiple
    return plan.subset(packs, step=step, slot=slot, rank0=rank0, num_micro_batches=counts, num_ranks=num_ranks)


def join_epochs(plans: Sequence[Plan]) -> Plan:
    """Run plans one after the other as one. Raises PlanError unless they share tiers, ranks, data and schedule."""
    head = plans[0]
    for other in plans[1:]:
        for name in ("tiers", "num_ranks", "data", "schedule"):
            if getattr(other, name) != getattr(head, name):
                raise PlanError(f"epochs differ in {name}; plan them with the same options")
    first_step = np.cumsum([0] + [plan.num_steps for plan in plans])
    first_sample = np.cumsum([0] + [len(plan.sample_ids) for plan in plans])
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(plan, name) for plan in plans])
        for name in ("sample_ids", "lengths", "pack_tier", "pack_slot", "pack_rank0", "num_micro_batches")
    }
    steps = [plan.pack_step + np.int32(start) for plan, start in zip(plans, first_step, strict=False)]
    offsets = [plan.pack_offsets[1:] + start for plan, start in zip(plans, first_sample, strict=False)]
    return replace(
        head,
        **joined,
        pack_step=np.concatenate(steps),
        pack_offsets=np.concatenate([[0], *offsets]),
        counts={key: sum(plan.counts.get(key, 0) for plan in plans) for key in head.counts},
    )


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch, counted from 0; the first keeps `seed`."""
    return seed if epoch == 0 else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def mixture_repeats(source: np.ndarray, weights: Sequence[float], seed: int = 0) -> np.ndarray:
    """How often each sample occurs when source s is repeated `weights[s]` times: int64 [samples].

    `source` int [samples]. The whole part of a weight repeats every sample, the rest picks samples at random.
    """
    rng = np.random.default_rng(seed)
    repeats = np.zeros(len(source), np.int64)
    for index, weight in enumerate(weights):
        if weight < 0:
            raise ConfigError(f"weight {weight} of source {index} is negative")
        members = np.flatnonzero(source == index)
        repeats[members] = int(weight)
        extra = round((weight - int(weight)) * len(members))
        repeats[rng.permutation(members)[:extra]] += 1
    return repeats
