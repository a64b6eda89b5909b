"""From samples to packs, every tier: long ones by the closest fit, short ones distributed around them."""

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.packing.best_fit import best_fit_decreasing, closest_fit
from megatron_hbp.planning.packing.distribute import Room, distribute, log_units
from megatron_hbp.planning.packing.fill import greedy_fill
from megatron_hbp.planning.packing.methods import PackingMethod

_SPARE_SHARE = 300 / 131072
"""Share of a long pack kept free for short samples: about ten tiny ones even out the content of a step."""

_CLOSEST_FIT_SAMPLES = 4096
"""Long samples packed at once; the search for close fits takes quadratic time, and more gain nothing."""

_PART_SAMPLES = 1 << 20
"""Short samples distributed at once."""


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
    logs = log_units(lengths)
    mean_log = int(logs.sum()) // len(logs)
    num_long = len(pack_tier)
    room = _room(lengths, logs - mean_log, pack_of, np.array([tier.packing_length for tier in tiers])[pack_tier])

    short = np.flatnonzero(pack_of < 0)
    tokens = max(0, int(lengths[short].sum() - room.tokens.sum()))
    num_full, num_last = whole_slots(tokens / capacity, int(widths[pack_tier].sum()), width, num_ranks)
    placed = _distribute_in_parts(lengths[short], mean_log, room, capacity, num_full, rng)
    left = short[placed < 0]
    pack_of[short] = placed
    num_packs = num_long + num_full
    pack_of[left] = num_packs + spread(lengths[left], capacity, num_last)

    used = np.bincount(pack_of) > 0
    tier_of = np.concatenate([pack_tier, np.zeros(len(used) - num_long, np.int64)])
    return Packs(pack_of=(np.cumsum(used) - 1)[pack_of], pack_tier=tier_of[used])


def filled_packs(
    lengths: np.ndarray, tiers: tuple[Tier, ...], method: PackingMethod, rng: np.random.Generator
) -> Packs:
    """The paper's way (algorithm 2): pack each tier by `method`, fill room with shorter samples, longest tier first."""
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
        shorter = rng.permutation(np.flatnonzero((tier_of < index) & (pack_of < 0)))
        # A random draw of twice the room: of all, the longest would fill, and the shortest tier lose its long samples.
        shorter = shorter[: int(np.searchsorted(np.cumsum(lengths[shorter]), 2 * room.sum()))]
        filled = greedy_fill(room, lengths[shorter])
        pack_of[own] = packed + num_packs
        pack_of[shorter] = np.where(filled >= 0, filled + num_packs, -1)
        pack_tier.append(np.full(len(room), index))
        num_packs += len(room)
    return Packs(pack_of=pack_of, pack_tier=np.concatenate(pack_tier))


def whole_slots(short_packs: float, long_width: int, width: int, num_ranks: int) -> tuple[int, int]:
    """How many full short packs to make, and how many for what is left: (full, last).

    `short_packs` is what the short samples would fill, `long_width` the ranks that long packs take. The last packs
    share one slot. Spread over all ranks it ends soonest; but in a nearly empty slot that is all padding, so with many
    slots padding and idle ranks share what the slot wastes about equally.
    """
    slots = (short_packs * width + long_width) / num_ranks
    # Packs end up to 2.5e-4 of their tokens short of full: without that margin the last slot overflows into one more.
    whole = int(slots * (1 + 2.5e-4) + 0.02)
    num_full = max(0, (whole * num_ranks - long_width) // width)
    gangs = max(1, num_ranks // width)
    needed = max(0.0, slots - whole)
    share = 1.0 if needed > 0.52 or whole < 100 else needed + 0.45 * (1 - needed)
    return num_full, max(1, int(share * gangs))


def _long_packs(lengths: np.ndarray, tiers: tuple[Tier, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pack what does not fit the shortest tier, longest tier first: (pack_of [n], -1 for short ones; pack_tier)."""
    pack_of = np.full(len(lengths), -1, np.int64)
    pack_tier: list[int] = []
    long = np.flatnonzero(lengths > tiers[0].packing_length)
    long = long[longest_first(lengths[long])]
    num_parts = -(-len(long) // _CLOSEST_FIT_SAMPLES)
    for part in range(num_parts):
        rest = long[part::num_parts]  # alike in length
        for index in range(len(tiers) - 1, 0, -1):
            capacity = tiers[index].packing_length
            num_own = int((lengths[rest] > tiers[index - 1].packing_length).sum())
            packed = closest_fit(lengths[rest], num_own, capacity, int(capacity * _SPARE_SHARE))
            joined = packed >= 0
            pack_of[rest[joined]] = packed[joined] + len(pack_tier)
            pack_tier += [index] * (int(packed.max(initial=-1)) + 1)
            rest = rest[~joined]
    return pack_of, np.array(pack_tier, np.int64)


def _distribute_in_parts(
    lengths: np.ndarray, mean_log: int, room: Room, capacity: int, num_packs: int, rng: np.random.Generator
) -> np.ndarray:
    """`distribute`, a million samples at a time: arrays then stay in the cache, and time stays linear."""
    num_parts = -(-len(lengths) // _PART_SAMPLES)
    num_long = len(room.tokens)
    samples = [np.arange(part, len(lengths), num_parts) for part in range(num_parts)]
    targets = [np.arange(part, num_long, num_parts) for part in range(num_parts)]
    tokens = np.array(
        [lengths[s].sum() - room.tokens[t].sum() for s, t in zip(samples, targets, strict=True)], np.int64
    )
    shares = np.maximum(tokens, 0) / max(int(np.maximum(tokens, 0).sum()), 1)
    bounds = np.rint(num_packs * np.append(0, np.cumsum(shares))).astype(np.int64)
    pack_of = np.empty(len(lengths), np.int64)
    for part, (own, long) in enumerate(zip(samples, targets, strict=True)):
        own_room = Room(tokens=room.tokens[long], excess=room.excess[long])
        count = int(bounds[part + 1] - bounds[part])
        placed = distribute(lengths[own], mean_log=mean_log, room=own_room, capacity=capacity, num_packs=count, rng=rng)
        numbers = np.concatenate([long, num_long + bounds[part] + np.arange(count), [-1]])
        pack_of[own] = numbers[placed]  # -1, left over, picks the last
    return pack_of


def _room(lengths: np.ndarray, excess: np.ndarray, pack_of: np.ndarray, capacity: np.ndarray) -> Room:
    packed = pack_of >= 0
    used = np.bincount(pack_of[packed], lengths[packed], len(capacity)).astype(np.int64)
    inside = np.bincount(pack_of[packed], excess[packed], len(capacity)).astype(np.int64)
    return Room(tokens=capacity - used, excess=inside)


def spread(lengths: np.ndarray, capacity: int, num_packs: int) -> np.ndarray:
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
