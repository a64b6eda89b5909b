"""Gang schedule: ranks meet once a step, so that inside a step gangs of any degree and single ranks run side by side.

For dense models without a pipeline. Each step is a random draw of samples; long ones become gangs of the least CP
degree that fits memory and the step's mean time, then short ones go to ranks longest first, always to the rank that
would be done first (longest processing time), by their whole modelled cost.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import TierCost
from megatron_hbp.planning.packing.best_fit import best_fit_decreasing
from megatron_hbp.planning.packing.hierarchical import Packs
from megatron_hbp.planning.request import Occurrences, Request
from megatron_hbp.planning.schedule.placement import Placement


def gang_packs(planned: Occurrences, request: Request, rng: np.random.Generator) -> tuple[Packs, Placement]:
    """Draw steps at random, each of about `step_tokens`, and place every step by itself."""
    lengths = planned.lengths
    step_of = draw_steps(lengths, request, rng)
    by_step = np.argsort(step_of, kind="stable")
    pack_of = np.empty(len(lengths), np.int64)
    columns: list[tuple[int, int, int, int]] = []  # tier, step, slot, rank0
    counts = []
    for step, members in enumerate(np.split(by_step, np.cumsum(np.bincount(step_of))[:-1])):
        packs, placement = place_step(lengths[members], request)
        pack_of[members] = packs.pack_of + len(columns)
        where = zip(packs.pack_tier.tolist(), placement.slot.tolist(), placement.rank0.tolist(), strict=True)
        columns += [(tier, step, slot, rank0) for tier, slot, rank0 in where]
        counts.append(int(placement.num_micro_batches[0]))
    tier, step, slot, rank0 = np.array(columns, np.int64).T
    placement = Placement(step=step, slot=slot, rank0=rank0, num_micro_batches=np.array(counts))
    return Packs(pack_of=pack_of, pack_tier=tier), placement


def draw_steps(lengths: np.ndarray, request: Request, rng: np.random.Generator) -> np.ndarray:
    """Step of each sample, int64 [n]: long samples are spread evenly over the steps, short ones fill up at random."""
    num_steps = max(1, round(lengths.sum() / request.step_tokens))
    long = np.flatnonzero(lengths > request.tiers[0].packing_length)
    step_of = np.empty(len(lengths), np.int64)
    # One of each stratum of length per step, in an order of its own: even, yet random.
    ranked = long[np.argsort(-lengths[long], kind="stable")]
    turns = [rng.permutation(num_steps) for _ in range(-(-len(ranked) // num_steps))]
    step_of[ranked] = np.ravel(turns)[: len(ranked)]
    load = np.bincount(step_of[long], lengths[long], num_steps)
    short = rng.permutation(np.flatnonzero(lengths <= request.tiers[0].packing_length))
    room = np.maximum(lengths.sum() / num_steps - load, 1)
    ends = np.cumsum(lengths[short])
    if len(short):
        bounds = np.cumsum(room) * (ends[-1] / room.sum())
        step_of[short] = np.searchsorted(bounds[:-1], ends - lengths[short] / 2, "right")
    return np.unique(step_of, return_inverse=True)[1]


def place_step(lengths: np.ndarray, request: Request) -> tuple[Packs, Placement]:
    """Place the samples of one step [n] on the ranks; also the online planner's whole job.

    A sample that would outlast the step takes a higher CP degree than memory asks for.
    """
    tiers, num_ranks = request.tiers, request.num_ranks
    costs = [request.cost.tier_cost(tier) for tier in tiers]
    order = np.argsort(-lengths, kind="stable")
    mean = _mean_seconds(lengths, tiers[0], costs[0], num_ranks)
    loads = np.zeros(num_ranks)
    next_slot = np.zeros(num_ranks, np.int64)
    pack_of = np.empty(len(lengths), np.int64)
    packs: list[tuple[int, int, int]] = []  # tier, slot, rank0

    for sample in order.tolist():
        length = int(lengths[sample])
        tier = _least_tier(length, mean, tiers, costs)
        if tier == 0:
            break  # and so are all shorter ones
        width = tiers[tier].cp_degree
        gangs = loads.reshape(-1, width).max(axis=1)
        rank0 = int(gangs.argmin()) * width
        ranks = slice(rank0, rank0 + width)
        pack_of[sample] = len(packs)
        packs.append((tier, int(next_slot[ranks].max()), rank0))
        loads[ranks] = gangs.min() + costs[tier].seconds(length, length**2)
        next_slot[ranks] = packs[-1][1] + 1

    width, capacity = tiers[0].cp_degree, tiers[0].packing_length
    short = order[len(packs) :]
    gang_of = _longest_to_emptiest(lengths[short], loads.reshape(-1, width).max(axis=1), costs[0], capacity)
    for gang in np.unique(gang_of).tolist():
        samples = short[gang_of == gang]
        inside = best_fit_decreasing(lengths[samples], capacity)
        pack_of[samples] = inside + len(packs)
        first = int(next_slot[gang * width : (gang + 1) * width].max())
        packs += [(0, first + index, gang * width) for index in range(int(inside.max()) + 1)]
    tier_of, slot, rank = np.array(packs, np.int64).T
    placement = Placement(
        step=np.zeros(len(packs), np.int64), slot=slot, rank0=rank, num_micro_batches=np.array([slot.max() + 1])
    )
    return Packs(pack_of=pack_of, pack_tier=tier_of), placement


def _longest_to_emptiest(lengths: np.ndarray, loads: np.ndarray, cost: TierCost, capacity: int) -> np.ndarray:
    """Gang of each sample [n], given longest first: always the one that would be done first.

    `loads` [gangs] are seconds already placed. A micro-batch's fixed cost counts as soon as it is opened; they are
    packed later, so one counts as full at 98% of `capacity`.
    """
    gang_of = np.empty(len(lengths), np.int64)
    seconds = (cost.per_token * lengths + cost.per_square * lengths**2).tolist()
    heap = [(load + cost.fixed, gang, 0.98 * capacity) for gang, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    for sample, size in enumerate(lengths.tolist()):
        load, gang, room = heap[0]
        gang_of[sample] = gang
        load += seconds[sample]
        room -= size
        while room < 0:
            room += 0.98 * capacity
            load += cost.fixed
        heapq.heapreplace(heap, (load, gang, room))
    return gang_of


def _mean_seconds(lengths: np.ndarray, tier: Tier, cost: TierCost, num_ranks: int) -> float:
    """Seconds of a step on each rank if everything ran at the least CP degree, in full micro-batches."""
    fixed = cost.fixed * max(lengths.sum() / tier.packing_length, num_ranks / tier.cp_degree)
    work = cost.per_token * lengths.sum() + cost.per_square * float((lengths**2).sum())
    return tier.cp_degree * float(fixed + work) / num_ranks


def _least_tier(length: int, mean: float, tiers: Sequence[Tier], costs: Sequence[TierCost]) -> int:
    """The least tier that holds a sample and leaves time in the step for a short micro-batch; else the widest."""
    fitting = [index for index, tier in enumerate(tiers) if length <= tier.packing_length]
    limit = mean - 1.5 * costs[0].fixed
    return next((index for index in fitting if costs[index].seconds(length, length**2) <= limit), fitting[-1])
