"""Lay packs out over steps, slots and ranks."""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.file import to_json
from megatron_hbp.planning.packing.hierarchical import Packs
from megatron_hbp.planning.request import Occurrences, Request
from megatron_hbp.planning.schedule.slots import balanced_slots, random_slots, steps_of_slots


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where packs run; every field but the last int64 [packs]."""

    step: np.ndarray
    slot: np.ndarray
    rank0: np.ndarray
    num_micro_batches: np.ndarray
    """int64 [steps]."""


def place_lockstep(packs: Packs, planned: Occurrences, request: Request, rng: np.random.Generator) -> Placement:
    """Packs of like modelled time side by side (or at random), slots shuffled into steps."""
    tiers = request.tiers
    widths = np.array([tier.cp_degree for tier in tiers])[packs.pack_tier]
    local = np.array([tier.local_tokens for tier in tiers])[packs.pack_tier]
    if request.is_balanced:
        seconds = pack_seconds(packs, planned.lengths, request)
        slot_of, rank0 = balanced_slots(seconds, widths, request.num_ranks)
    else:
        slot_of, rank0 = random_slots(widths, request.num_ranks, rng)
    num_slots = int(slot_of.max()) + 1
    slot_tokens, slot_width = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
    np.maximum.at(slot_tokens, slot_of, local * request.num_ranks)
    np.maximum.at(slot_width, slot_of, widths)
    step, slot = steps_of_slots(
        slot_tokens,
        slot_width,
        request.step_tokens,
        rng,
        num_first_steps=request.curriculum_steps,
        multiple=request.slot_multiple,
    )
    counts = -(-np.bincount(step) // request.slot_multiple) * request.slot_multiple
    return Placement(step=step[slot_of], slot=slot[slot_of], rank0=rank0, num_micro_batches=counts)


def pack_seconds(packs: Packs, lengths: np.ndarray, request: Request) -> np.ndarray:
    """Modelled seconds of each pack, float64 [packs]."""
    num_packs = len(packs.pack_tier)
    tokens = np.bincount(packs.pack_of, lengths, num_packs)
    squares = np.bincount(packs.pack_of, lengths.astype(float) ** 2, num_packs)
    return request.cost.pack_seconds(request.tiers, packs.pack_tier, tokens, squares)


def write_plan(packs: Packs, planned: Occurrences, placement: Placement, request: Request, samples: Samples) -> Plan:
    """The Plan of packs and where they run."""
    return Plan.build(
        tiers=request.tiers,
        sample_ids=planned.ids,
        lengths=planned.lengths,
        pack_of=packs.pack_of,
        pack_tier=packs.pack_tier,
        step=placement.step,
        slot=placement.slot,
        rank0=placement.rank0,
        num_micro_batches=placement.num_micro_batches,
        num_ranks=request.num_ranks,
        schedule=request.schedule,
        seed=request.seed,
        step_tokens=request.step_tokens,
        cost=to_json(request.cost),
        data=DataFingerprint.of(samples),
        counts=planned.counts,
    )
