"""From samples to packs, every tier: long ones tightly, then everything short dealt around them."""

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.deal import Room, deal, log_excess
from megatron_hbp.planning.fill import greedy_fill, longest_first
from megatron_hbp.planning.packing import PackingMethod
from megatron_hbp.planning.tight import best_fit_decreasing, pack_tightly
from megatron_hbp.planning.types import Tier

_SPARE_SHARE = 300 / 131072
"""Share of a long pack kept free for short samples: about ten tiny ones even out the content of a step."""


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Samples in packs, before anything is scheduled."""

    pack_of: np.ndarray
    """int64 [samples]."""
    pack_tier: np.ndarray
    """int64 [packs]."""


def group_data(lengths: np.ndarray, tiers: tuple[Tier, ...]) -> np.ndarray:
    """GroupData (algorithm 5): the shortest tier that holds each sample, int64 [n]; too long ones get len(tiers)."""
    return np.searchsorted([tier.packing_length for tier in tiers], lengths, "left")


def balanced_packs(lengths: np.ndarray, tiers: tuple[Tier, ...], num_ranks: int, rng: np.random.Generator) -> Packs:
    """Packs that are full, alike in content, and as many as fill whole slots of `num_ranks` ranks.

    `lengths` int64 [n], none longer than the longest tier.
    """
    pack_of, pack_tier = _long_packs(lengths, tiers)
    widths = np.array([tier.cp_degree for tier in tiers])
    capacity, width = tiers[0].packing_length, tiers[0].cp_degree
    excess = log_excess(lengths)
    num_long = len(pack_tier)
    room = _room(lengths, excess, pack_of, np.array([tier.packing_length for tier in tiers])[pack_tier])

    short = np.flatnonzero(pack_of < 0)
    tokens = max(0, int(lengths[short].sum() - room.tokens.sum()))
    num_full, num_last = whole_slots(tokens / capacity, int(widths[pack_tier].sum()), width, num_ranks)
    dealt = deal(lengths[short], excess[short], room=room, capacity=capacity, num_packs=num_full, rng=rng)
    left = short[dealt < 0]
    pack_of[short] = dealt
    num_packs = num_long + num_full
    pack_of[left] = num_packs + _spread(lengths[left], capacity, num_last)

    used, numbers = np.unique(pack_of, return_inverse=True)
    tier_of = np.concatenate([pack_tier, np.zeros(max(int(used[-1]) + 1 - num_long, 0), np.int64)])
    return Packs(pack_of=numbers, pack_tier=tier_of[used])


def filled_packs(lengths: np.ndarray, tiers: tuple[Tier, ...], method: PackingMethod, rng: np.random.Generator) -> Packs:
    """The paper's way (algorithm 2): pack every tier by `method`, fill room with shorter samples, longest tier first."""
    tier_of = group_data(lengths, tiers)
    pack_of = np.full(len(lengths), -1, np.int64)
    pack_tier: list[np.ndarray] = []
    num_packs = 0
    for index in reversed(range(len(tiers))):
        capacity = tiers[index].packing_length
        own = np.flatnonzero((tier_of == index) & (pack_of < 0))
        if not len(own):
            continue
        packed = method(lengths[own], capacity, rng)
        room = capacity - np.bincount(packed, lengths[own]).astype(np.int64)
        shorter = np.flatnonzero((tier_of < index) & (pack_of < 0))
        filled = greedy_fill(room, lengths[shorter])
        pack_of[own] = packed + num_packs
        pack_of[shorter] = np.where(filled >= 0, filled + num_packs, -1)
        pack_tier.append(np.full(len(room), index))
        num_packs += len(room)
    return Packs(pack_of=pack_of, pack_tier=np.concatenate(pack_tier))


def whole_slots(short_packs: float, long_width: int, width: int, num_ranks: int) -> tuple[int, int]:
    """How many full short packs to make, and how many for what is left: (full, last).

    `short_packs` is what the short samples would fill, `long_width` the ranks that long packs take. The last packs share
    one slot that may be nearly empty; nearly half of its ranks get one, which bounds padding and idling by half a
    slot each, where filling every slot a little less would cost the same time and more padding.
    """
    slots = (short_packs * width + long_width) / num_ranks
    # Without a margin for what does not fit, the last slot would overflow into one more.
    whole = int(slots + 0.02)
    num_full = max(0, (whole * num_ranks - long_width) // width)
    share = slots - whole
    gangs = max(1, num_ranks // width)
    return num_full, gangs if share >= 0.45 or not num_full else max(1, int(0.45 * gangs))


def _long_packs(lengths: np.ndarray, tiers: tuple[Tier, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pack what does not fit the shortest tier, longest tier first: (pack_of [n], -1 for short ones; pack_tier)."""
    pack_of = np.full(len(lengths), -1, np.int64)
    pack_tier: list[int] = []
    long = np.flatnonzero(lengths > tiers[0].packing_length)
    long = long[longest_first(lengths[long])]
    for index in range(len(tiers) - 1, 0, -1):
        capacity = tiers[index].packing_length
        num_own = int((lengths[long] > tiers[index - 1].packing_length).sum())
        packed = pack_tightly(lengths[long], num_own, capacity, int(capacity * _SPARE_SHARE))
        joined = packed >= 0
        pack_of[long[joined]] = packed[joined] + len(pack_tier)
        pack_tier += [index] * (int(packed.max(initial=-1)) + 1)
        long = long[~joined]
    return pack_of, np.array(pack_tier, np.int64)


def _room(lengths: np.ndarray, excess: np.ndarray, pack_of: np.ndarray, capacity: np.ndarray) -> Room:
    packed = pack_of >= 0
    used = np.bincount(pack_of[packed], lengths[packed], len(capacity)).astype(np.int64)
    inside = np.bincount(pack_of[packed], excess[packed], len(capacity)).astype(np.int64)
    return Room(tokens=capacity - used, excess=inside)


def _spread(lengths: np.ndarray, capacity: int, num_packs: int) -> np.ndarray:
    """Longest first into the emptiest of `num_packs` packs, what fits none into packs of its own: pack_of [n]."""
    pack_of = np.full(len(lengths), -1, np.int64)
    loads = [(0, pack) for pack in range(num_packs)]
    for sample in longest_first(lengths).tolist():
        load, pack = loads[0]
        if load + lengths[sample] <= capacity:
            pack_of[sample] = pack
            heapq.heapreplace(loads, (load + int(lengths[sample]), pack))
    rest = np.flatnonzero(pack_of < 0)
    pack_of[rest] = num_packs + best_fit_decreasing(lengths[rest], capacity)
    return pack_of
