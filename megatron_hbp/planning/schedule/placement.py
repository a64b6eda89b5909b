"""Lay packs out over steps, slots and ranks, and write the columns of a Plan."""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.packing.fill import stable_order
from megatron_hbp.planning.packing.hierarchical import Packs
from megatron_hbp.planning.schedule.slots import balanced_slots, random_slots, steps_of_slots


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan is made for; the fields mean what they mean in `make_plan`."""

    tiers: tuple[Tier, ...]
    num_ranks: int
    step_tokens: int
    seed: int
    schedule: str
    cost: CostModel
    data: DataFingerprint
    curriculum_steps: int = 0
    slot_multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Occurrences:
    """The multiset of samples that a plan runs, each occurrence exactly once."""

    ids: np.ndarray
    """int64 [n], sample of each occurrence."""
    lengths: np.ndarray
    """int64 [n], tokens used."""
    loss_tokens: np.ndarray | None = None
    """int64 [n], supervised tokens."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where packs run; every field but the last int64 [packs]."""

    step: np.ndarray
    slot: np.ndarray
    rank0: np.ndarray
    num_micro_batches: np.ndarray
    """int64 [steps]."""


def place_lockstep(
    packs: Packs, occurrences: Occurrences, request: Request, rng: np.random.Generator, *, balanced: bool = True
) -> Placement:
    """Packs of like modelled time side by side (or at random), slots shuffled into steps."""
    tiers = request.tiers
    widths = np.array([tier.cp_degree for tier in tiers])[packs.pack_tier]
    local = np.array([tier.local_tokens for tier in tiers])[packs.pack_tier]
    if balanced:
        seconds = pack_seconds(packs, occurrences.lengths, request)
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


def write_plan(
    packs: Packs, occurrences: Occurrences, placement: Placement, request: Request, counts: dict[str, int]
) -> Plan:
    """The Plan: packs sorted by (step, slot, rank0), samples of a pack in the order of the data.

    In packs that ranks share the longest come first, so that short ones lie together and on one rank each.
    """
    num_packs = len(packs.pack_tier)
    order = np.lexsort((placement.rank0, placement.slot, placement.step))
    new_index = np.empty(num_packs, np.int64)
    new_index[order] = np.arange(num_packs)
    pack_of = new_index[packs.pack_of]
    widths = np.array([tier.cp_degree for tier in request.tiers])[packs.pack_tier]
    by_pack = _longest_first_in_shared(stable_order(pack_of), pack_of, occurrences.lengths, widths[order] > 1)
    slots = int(placement.num_micro_batches.sum())
    lockstep = request.schedule == "lockstep"
    return Plan(
        tiers=request.tiers,
        sample_ids=occurrences.ids[by_pack],
        lengths=occurrences.lengths[by_pack].astype(np.int32),
        pack_offsets=np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))]),
        pack_tier=packs.pack_tier[order].astype(np.int32),
        pack_step=placement.step[order].astype(np.int32),
        pack_slot=placement.slot[order].astype(np.int32),
        pack_rank0=placement.rank0[order].astype(np.int32),
        num_micro_batches=placement.num_micro_batches.astype(np.int32),
        num_ranks=request.num_ranks,
        schedule=request.schedule,
        seed=request.seed,
        step_tokens=request.step_tokens,
        cost_model=request.cost.name,
        data=request.data,
        counts=counts | {"dummies": slots * request.num_ranks - int(widths.sum()) if lockstep else 0},
    )


def _longest_first_in_shared(
    by_pack: np.ndarray, pack_of: np.ndarray, lengths: np.ndarray, is_shared: np.ndarray
) -> np.ndarray:
    """`by_pack` int64 [n] (samples in order of packs) with each shared pack's samples reordered, longest first."""
    places = np.flatnonzero(is_shared[pack_of[by_pack]])
    samples = by_pack[places]
    by_pack[places] = samples[np.lexsort((-lengths[samples], pack_of[samples]))]
    return by_pack
