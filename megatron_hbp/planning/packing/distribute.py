"""Distribute short samples into packs so that every pack is full and every pack holds the same mix of lengths.

Sorting packs by cost (balance batching) makes a step's content follow its cost, unless packs of different cost hold the
same mix. So that is how they are built:

    seeds    the longest samples, one per pack; neighbours in this order form groups of packs of like cost
    rest     goes to groups (and to the room of long packs) so that each ends with the mean log-length of all data:
             a group with long seeds gets shorter company
    level    inside a group: longest first, one round over the packs at a time, the longest to the emptiest pack
    top up   the shortest samples are kept back to fill what is left to the token

All of it is sorts and running sums over whole arrays: 0.3 s for a million samples. Logarithms are rounded to integers,
so that sums are exact and plans the same on every machine.

Legend: a *target* is a long pack with room or a group of packs; "excess" is log-length above the mean, summed.
"""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first, stable_order
from megatron_hbp.planning.packing.fill import greedy_fill

GROUP_PACKS = 32
"""Packs in a group: enough to average over, few enough that seeds in a group differ by little."""

_KEPT_BACK, _ROOM_FOR_TINY = 0.8, 1.05
"""Tiny samples kept back per pack, and room left for them over their tokens. With less room some of them are left over
at the end and make one odd step (eta^2 .009 at 1.00, .002 at 1.05); with more, packs stay less full."""

_BLOCK_GROUPS = 1024
"""Groups levelled at once: a million samples' arrays still fit the cache, so that time stays linear."""

_LOG_UNIT = 1 << 12


def log_units(lengths: np.ndarray) -> np.ndarray:
    """Log-length in units of 1/4096, int64 [n]."""
    return np.rint(np.log(lengths) * _LOG_UNIT).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Room:
    """Room in packs that already hold longer samples."""

    tokens: np.ndarray
    """int64 [packs], room left."""
    excess: np.ndarray
    """int64 [packs], summed log excess of what is in them."""


def distribute(
    lengths: np.ndarray, *, mean_log: int, room: Room, capacity: int, num_packs: int, rng: np.random.Generator
) -> np.ndarray:
    """Distribute samples into the room of long packs and into `num_packs` new packs of `capacity` tokens.

    `lengths` int64 [n], `mean_log` the mean of all data in `log_units`. Returns pack_of int64 [n]: long packs are
    numbered as in `room`, new ones follow; -1 for samples that are left over. New packs may stay empty where samples
    are too few or too long.
    """
    order = longest_first(lengths)
    lengths = lengths[order]
    excess = log_units(lengths) - mean_log
    num_packs = min(num_packs, len(lengths))
    num_tiny = min(int(_KEPT_BACK * (num_packs + len(room.tokens))), (len(lengths) - num_packs) // 2)
    seeds, tiny = slice(0, num_packs), slice(len(lengths) - num_tiny, len(lengths))
    middle = np.arange(num_packs, len(lengths) - num_tiny)

    pack_of = np.full(len(lengths), -1, np.int64)
    num_long = len(room.tokens)
    sizes = group_sizes(num_packs)
    targets = _targets(lengths, excess, seeds, tiny, room, capacity, sizes)
    target_of = _share_out(lengths, excess, middle, tiny, targets, rng)
    in_long = (target_of >= 0) & (target_of < num_long)
    pack_of[in_long] = target_of[in_long]
    if num_packs:
        grouped = np.flatnonzero((target_of >= num_long) & (target_of < num_long + len(sizes)))
        pack_of[seeds] = num_long + np.arange(num_packs)
        levelled = _level(lengths[seeds], lengths[grouped], target_of[grouped] - num_long, sizes)
        pack_of[grouped] = num_long + levelled
    free = np.concatenate([room.tokens, np.full(num_packs, capacity)])
    absorbed = target_of >= num_long + len(sizes)
    top_up(pack_of, lengths, free, ~absorbed)
    result = np.empty(len(lengths), np.int64)
    result[order] = pack_of
    return result


def group_sizes(num_packs: int) -> np.ndarray:
    """Packs of each group, int64 [groups]: GROUP_PACKS, and a smaller last one."""
    starts = np.arange(0, num_packs, GROUP_PACKS)
    return np.minimum(GROUP_PACKS, num_packs - starts)


def _targets(
    lengths: np.ndarray, excess: np.ndarray, seeds: slice, tiny: slice, room: Room, capacity: int, sizes: np.ndarray
) -> Room:
    """Room and excess of every target, after what the seeds and the kept-back tiny samples will take."""
    starts = np.cumsum(sizes) - sizes
    num_receivers = max(len(room.tokens) + int(sizes.sum()), 1)
    tiny_tokens = _ROOM_FOR_TINY * lengths[tiny].sum() / num_receivers
    tiny_excess = excess[tiny].sum() / num_receivers
    seed_tokens = np.add.reduceat(lengths[seeds], starts) if len(sizes) else np.zeros(0)
    seed_excess = np.add.reduceat(excess[seeds], starts) if len(sizes) else np.zeros(0)
    tokens = np.concatenate([room.tokens - tiny_tokens, sizes * (capacity - tiny_tokens) - seed_tokens])
    return Room(
        tokens=np.maximum(tokens, 0),
        excess=np.concatenate([room.excess + tiny_excess, seed_excess + sizes * tiny_excess]),
    )


def _share_out(
    lengths: np.ndarray, excess: np.ndarray, middle: np.ndarray, tiny: slice, targets: Room, rng: np.random.Generator
) -> np.ndarray:
    """Target of each sample [n] (len(targets) = for the last packs of all, -1 = kept back), evening out the excess.

    Samples fall into three kinds: upper and lower (above and below the mean log-length) and tiny. A target of room R
    and excess E gets u tokens of the upper and R - u of the lower kind such that its excess ends at zero,
    E + u * upper_rate + (R - u) * lower_rate = 0, rates being mean excess per token; where even u = 0 is too much,
    lower and tiny ones by the same rule.
    """
    target_of = np.full(len(lengths), -1, np.int64)
    above = int(np.searchsorted(-excess[middle], 0))
    kinds = middle[:above], middle[above:], np.arange(tiny.start, tiny.stop)
    upper_rate, lower_rate, tiny_rate = (excess[kind].sum() / max(lengths[kind].sum(), 1) for kind in kinds)
    upper, lower, shortest = kinds

    last = max(0.0, lengths[middle].sum() - targets.tokens.sum())
    tokens, goal = np.append(targets.tokens, last), np.append(targets.excess, 0)
    wish = _mix(goal, tokens, lower_rate, tiny_rate)
    kept_back = max(0.0, lengths[shortest].sum() - wish.sum())
    target_of[shortest] = _cut(lengths[shortest], np.append(wish, kept_back), rng)
    target_of[target_of == len(tokens)] = -1
    wish = _mix(goal, tokens, lower_rate, upper_rate)
    target_of[upper] = _cut(lengths[upper], wish, rng)
    placed = target_of >= 0
    taken = np.bincount(target_of[placed], lengths[placed], len(tokens))
    target_of[lower] = _cut(lengths[lower], np.maximum(tokens - taken, 0), rng)
    return target_of


def _mix(goal: np.ndarray, tokens: np.ndarray, rate: float, other_rate: float) -> np.ndarray:
    """Tokens [targets] of the other kind that, with the rest of `tokens` at `rate`, bring the excess `goal` to zero."""
    if rate == other_rate:
        return tokens / 2
    return np.clip((goal + rate * tokens) / (rate - other_rate), 0, tokens)


def _cut(lengths: np.ndarray, demand: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay samples end to end in random order, cut the line in proportion to `demand` [targets]: target of each [n]."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    order = rng.permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    bounds = np.cumsum(demand if demand.sum() > 0 else np.ones(len(demand)))
    middles = ends - lengths[order] / 2
    target_of = np.empty(len(lengths), np.int64)
    target_of[order] = np.searchsorted(bounds[:-1] * (ends[-1] / bounds[-1]), middles, "right")
    return target_of


def _level(seeds: np.ndarray, lengths: np.ndarray, group_of: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Distribute each group's samples over its packs: pack of each sample [n], numbered over all groups.

    `seeds` [packs] is what is in the packs, `lengths` [n] longest first, `group_of` [n], `sizes` [groups] packs.
    """
    by_group = stable_order(group_of)
    counts = np.bincount(group_of, minlength=len(sizes))
    ends, pack_ends = np.cumsum(counts), np.cumsum(sizes)
    pack_of = np.empty(len(lengths), np.int64)
    for first in range(0, len(sizes), _BLOCK_GROUPS):
        block = slice(first, first + _BLOCK_GROUPS)
        samples = by_group[ends[first] - counts[first] : ends[block][-1]]
        first_pack = int(pack_ends[first] - sizes[first])
        levelled = _level_block(
            seeds[first_pack : pack_ends[block][-1]], lengths[samples], group_of[samples] - first, sizes[block]
        )
        pack_of[samples] = first_pack + levelled
    return pack_of


def _level_block(seeds: np.ndarray, lengths: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """As `_level`, for samples sorted by `group` [n]. A round hands one sample to each pack of all groups at once."""
    num_groups, width = len(sizes), int(sizes.max())
    counts = np.bincount(group, minlength=num_groups)
    place = np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
    turn, column = place // sizes[group], place % sizes[group]
    num_rounds = int(turn.max(initial=-1)) + 1
    sample = np.full((num_rounds, num_groups, width), -1, np.int64)
    sample[turn, group, column] = np.arange(len(group))

    load = np.full((num_groups, width), np.iinfo(np.int64).max // 2)  # columns beyond a short last group stay last
    load[np.arange(width) < sizes[:, None]] = seeds
    first_pack = (np.cumsum(sizes) - sizes)[:, None]
    groups = np.arange(num_groups)[:, None]
    pack_of = np.empty(len(lengths) + 1, np.int64)  # the last entry collects the places without a sample
    padded = np.append(lengths, 0)
    for row in sample:
        emptiest = np.argsort(load, axis=1, kind="stable")
        load[groups, emptiest] += padded[row]
        pack_of[row] = first_pack + emptiest
    return pack_of[:-1]


def top_up(pack_of: np.ndarray, lengths: np.ndarray, free: np.ndarray, may_fill: np.ndarray) -> None:
    """Take out of overfull packs what is too much, shortest first, then fill all room; changes `pack_of` [n] in place.

    `free` int64 [packs] is the room of packs that are still empty; `may_fill` bool [n] says which samples without a
    pack may be used.
    """
    placed = np.flatnonzero(pack_of >= 0)
    room = free - np.bincount(pack_of[placed], lengths[placed], len(free)).astype(np.int64)
    suspects = placed[room[pack_of[placed]] < 0][::-1]  # shortest first
    suspects = suspects[stable_order(pack_of[suspects])]
    pack = pack_of[suspects]
    before = np.cumsum(lengths[suspects]) - lengths[suspects]
    start = np.searchsorted(pack, pack, "left")
    out = suspects[before - before[start] < -room[pack]]
    np.add.at(room, pack_of[out], lengths[out])
    pack_of[out] = -1
    unplaced = np.flatnonzero((pack_of < 0) & may_fill)
    pack_of[unplaced] = greedy_fill(room, lengths[unplaced])
