"""Make steps alike in loss tokens (supervised tokens) once everything has its place, by swaps of similar samples.

    long samples    those in packs of several ranks swap places with others nearly as long: few of them make a step,
                    so they decide most of what it is off. A swap must not cost more time than it evens out.
    all samples     swap places with others of exactly their length: nothing but loss tokens changes.

Loss tokens per step then vary by 4.8% instead of 9.1% (Tulu-3 + LongCite lengths, 512K tokens per step; 30% of samples
with few of them); idle stays at .085%.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first, stable_order
from megatron_hbp.planning.packing.distribute import top_up
from megatron_hbp.planning.packing.hierarchical import Packs, spread
from megatron_hbp.planning.request import Occurrences, Request
from megatron_hbp.planning.schedule.placement import Placement, pack_seconds

_LONG_ROUNDS, _LONG_REACH = 64, 32
"""Rounds of swaps of long samples, and how far apart in the order of length they are at most."""

_LONG_SPREAD = 0.03
"""Share by which long samples that swap places may differ in length."""

_LONG_SHARE = 1 / 4
"""Share of the shortest tier from which a sample counts as long; fillers are shorter as a rule."""

_SPARE_TOKENS = 250
"""Room for short samples that a pack keeps; with less, steps of long packs differ in content (eta^2 .005 at 100)."""

_LOOSE = 1 / 8
"""Share of its capacity that a pack of left-over samples has free; all others are full."""

_EVENNESS = 0.22
"""What the squared deviation of a step is worth, in waiting time over that of a slot: a step 10% off is worth .22%."""

_PLACES, _ROUNDS = 1 << 16, 8
"""Samples that swap places with their equals, the longest, and rounds: with more of both, steps vary by .4% less."""


def balance_loss_tokens(packs: Packs, planned: Occurrences, placement: Placement, request: Request) -> Packs:
    """`packs` with samples exchanged such that steps hold equal loss tokens; packs stay where they run."""
    lengths, loss = planned.lengths, planned.loss_tokens
    if loss is None or len(placement.num_micro_batches) < 2 or not loss.any():
        return packs
    pack_of = packs.pack_of
    if request.schedule == "lockstep":
        pack_of = _swap_long(packs, planned, placement, request)
    return replace(packs, pack_of=swap_equal(pack_of, placement.step, lengths, loss))


def swap_equal(pack_of: np.ndarray, step_of_pack: np.ndarray, lengths: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Exchange samples of equal length between steps with too many and too few loss tokens: pack_of int64 [n].

    `pack_of`, `lengths`, `loss` int64 [n], `step_of_pack` int64 [packs]. Each round pairs samples some places apart in
    the order of length. A step gives and takes at most what it is off its tokens' share, so that every round evens out.
    """
    pack_of = pack_of.copy()
    step = step_of_pack[pack_of]
    surplus = np.bincount(step, loss) - np.bincount(step, lengths) * (loss.sum() / lengths.sum())
    order = np.flatnonzero(lengths >= lengths.mean())
    order = order[longest_first(lengths[order])[:_PLACES]]
    sizes, tokens, pack = lengths[order], loss[order], pack_of[order]
    step = step_of_pack[pack]
    for turn in range(_ROUNDS):
        first, second = _pairs(len(order), 1 << turn)
        more = tokens[first] > tokens[second]
        giver, taker = np.where(more, first, second), np.where(more, second, first)
        useful = (sizes[first] == sizes[second]) & (surplus[step[giver]] > 0) & (surplus[step[taker]] < 0)
        giver, taker = giver[useful], taker[useful]
        moved = tokens[giver] - tokens[taker]
        fits = _running(moved, step[giver]) <= surplus[step[giver]]
        fits &= _running(moved, step[taker]) <= -surplus[step[taker]]
        giver, taker, moved = giver[fits], taker[fits], moved[fits]
        surplus -= np.bincount(step[giver], moved, len(surplus))
        surplus += np.bincount(step[taker], moved, len(surplus))
        for values in (pack, step):
            values[giver], values[taker] = values[taker], values[giver]
    pack_of[order] = pack
    return pack_of


def _pairs(count: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places below `count` that are `distance` apart, none in two pairs: (first, second), int64 [pairs]."""
    first = np.arange(max(count - distance, 0))
    first = first[first // distance % 2 == 0]
    return first, first + distance


def _running(amounts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the `amounts` [n] of the same `group` [n] so far, each included."""
    order = stable_order(group)
    sums, grouped = np.cumsum(amounts[order]), group[order]
    before = (sums - amounts[order])[np.searchsorted(grouped, grouped, "left")]
    result = np.empty(len(amounts), np.int64)
    result[order] = sums - before
    return result


@dataclass(frozen=True, kw_only=True)
class _SwapState:
    """What swaps of long samples depend on; the arrays of changing content are changed in place."""

    slot: np.ndarray
    """int64 [packs], counted over all steps."""
    step: np.ndarray
    """int64 [packs]."""
    beside: np.ndarray
    """Indices of the packs in slots with packs of several ranks."""
    per_square: np.ndarray
    """float64 [packs], seconds."""
    mean_seconds: float
    """Of a slot."""
    seconds: np.ndarray
    """float64 [packs], changing."""
    free: np.ndarray
    """int64 [packs], room beside long samples, changing."""
    off: np.ndarray
    """float64 [steps], loss tokens over their mean - 1, changing."""


def _swap_long(packs: Packs, planned: Occurrences, placement: Placement, request: Request) -> np.ndarray:
    """Exchange long samples of nearly equal length between packs of several ranks: pack_of int64 [n].

    Short samples of these packs then move to where room was left.
    """
    lengths, loss, pack_of = planned.lengths, planned.loss_tokens, packs.pack_of.copy()
    assert loss is not None
    inside = np.flatnonzero(packs.pack_tier[pack_of] > 0)
    inside = inside[longest_first(lengths[inside])]
    num_long = int((lengths[inside] > request.tiers[0].packing_length * _LONG_SHARE).sum())
    long, short = inside[:num_long], inside[num_long:]
    if not num_long:
        return pack_of
    state = _swap_state(packs, planned, placement, request, long)
    pack = pack_of[long]
    for turn in range(_LONG_ROUNDS):
        _swap_round(state, 1 + turn % _LONG_REACH, lengths[long], loss[long] * len(state.off) / loss.sum(), pack)
    pack_of[long] = pack
    capacity = np.array([tier.packing_length for tier in request.tiers])[packs.pack_tier]
    return pack_of if _refill(pack_of, short, lengths, capacity, packs.pack_tier, state.free) else packs.pack_of


def _refill(
    pack_of: np.ndarray,
    short: np.ndarray,
    lengths: np.ndarray,
    capacity: np.ndarray,
    tier: np.ndarray,
    free: np.ndarray,
) -> bool:
    """Fill the room `free` [packs] beside long samples anew, changing as little as possible of `pack_of` [n] in place.

    What moves are the samples `short` of packs of several ranks, and those in the packs of what was left over, which
    are spread again. False where a sample would not find a place.
    """
    room = capacity - np.bincount(pack_of, lengths, len(capacity)).astype(np.int64)
    is_loose = (tier == 0) & (room > _LOOSE * capacity)
    loose, left_over = np.flatnonzero(is_loose), np.flatnonzero(is_loose[pack_of])
    movable = np.concatenate([short, left_over])
    movable = movable[longest_first(lengths[movable])]
    refilled = np.where(tier[pack_of[movable]] > 0, pack_of[movable], -1)
    top_up(refilled, lengths[movable], np.where(tier > 0, free, 0), np.full(len(movable), True))
    rest = refilled < 0
    if rest.any() and not len(loose):
        return False
    again = spread(lengths[movable[rest]], int(capacity.min()), len(loose))
    if not np.array_equal(np.unique(again), np.arange(len(loose))):  # an empty pack, or one too many
        return False
    refilled[rest] = loose[again]
    pack_of[movable] = refilled
    return True


def _swap_state(
    packs: Packs, planned: Occurrences, placement: Placement, request: Request, long: np.ndarray
) -> _SwapState:
    first_slot = np.cumsum(placement.num_micro_batches) - placement.num_micro_batches
    slot = first_slot[placement.step] + placement.slot
    capacity = np.array([tier.packing_length for tier in request.tiers])[packs.pack_tier]
    widths = np.array([tier.cp_degree for tier in request.tiers])[packs.pack_tier]
    per_square = np.array([request.cost.tier_cost(tier).per_square for tier in request.tiers])[packs.pack_tier]
    seconds = pack_seconds(packs, planned.lengths, request)
    in_long = np.bincount(packs.pack_of[long], planned.lengths[long], len(capacity)).astype(np.int64)
    per_step = np.bincount(placement.step[packs.pack_of], planned.loss_tokens)
    return _SwapState(
        slot=slot,
        step=placement.step,
        beside=np.flatnonzero(np.isin(slot, slot[packs.pack_tier > 0])),
        per_square=per_square,
        mean_seconds=math.fsum(seconds * widths) / request.num_ranks / int(placement.num_micro_batches.sum()),
        seconds=seconds,
        free=capacity - in_long,
        off=per_step / per_step.mean() - 1,
    )


def _swap_round(state: _SwapState, distance: int, lengths: np.ndarray, loss: np.ndarray, pack: np.ndarray) -> None:
    """Let samples `distance` apart swap places where that lowers waiting time plus unevenness; changes `pack` [n].

    `lengths` int64 [n] longest first, `loss` [n] over the mean of a step. A step takes part in one swap per round.
    """
    longer, shorter = _pairs(len(lengths), distance)
    more = lengths[longer] - lengths[shorter]
    a, b = pack[longer], pack[shorter]
    allowed = (state.slot[a] != state.slot[b]) & (more <= _LONG_SPREAD * lengths[longer])
    allowed &= state.free[b] - more >= _SPARE_TOKENS
    longer, shorter, more, a, b = (values[allowed] for values in (longer, shorter, more, a, b))

    squares = lengths[longer] ** 2 - lengths[shorter] ** 2
    seconds_a = state.seconds[a] - state.per_square[a] * squares
    seconds_b = state.seconds[b] + state.per_square[b] * squares
    slowest, first, second = _two_slowest(state.seconds, state.slot, state.beside)
    waiting = np.zeros(len(a))
    for one, after in ((a, seconds_a), (b, seconds_b)):
        slot = state.slot[one]
        others = np.where(slowest[slot] == one, second[slot], first[slot])
        waiting += np.maximum(others, after) - first[slot]
    step_a, step_b = state.step[a], state.step[b]
    moved = np.where(step_a == step_b, 0, loss[shorter] - loss[longer])
    off_a, off_b = state.off[step_a], state.off[step_b]
    uneven = (off_a + moved) ** 2 - off_a**2 + (off_b - moved) ** 2 - off_b**2
    best = _best_apart(-waiting / state.mean_seconds - _EVENNESS * uneven, step_a, step_b)

    state.seconds[a[best]], state.seconds[b[best]] = seconds_a[best], seconds_b[best]
    state.off[step_a[best]] += moved[best]
    state.off[step_b[best]] -= moved[best]
    state.free[a[best]] += more[best]
    state.free[b[best]] -= more[best]
    pack[longer[best]], pack[shorter[best]] = b[best], a[best]


def _two_slowest(seconds: np.ndarray, slot: np.ndarray, packs: np.ndarray) -> tuple[np.ndarray, ...]:
    """The slowest of `packs` (whole slots) in each slot, its seconds, and those of the next: all [slots].

    `seconds`, `slot` are [all packs]; slots without any of `packs` hold -1 and zeros.
    """
    num_slots = int(slot.max()) + 1
    pack, first, second = np.full(num_slots, -1), np.zeros(num_slots), np.zeros(num_slots)
    order = packs[np.lexsort((seconds[packs], slot[packs]))]
    place = slot[order]
    last = np.flatnonzero(np.append(np.diff(place) > 0, True))
    pack[place[last]], first[place[last]] = order[last], seconds[order[last]]
    has_next = last[(last > 0) & (place[last - 1] == place[last])]
    second[place[has_next]] = seconds[order[has_next - 1]]
    return pack, first, second


def _best_apart(gain: np.ndarray, step_a: np.ndarray, step_b: np.ndarray) -> np.ndarray:
    """Indices of swaps with `gain` [n] above 0 that share no step with a better one."""
    best_first = np.argsort(-gain, kind="stable")
    best_first = best_first[gain[best_first] > 1e-9]
    place = np.arange(len(best_first))
    first = np.full(int(max(step_a.max(initial=0), step_b.max(initial=0))) + 1, len(gain))
    for steps in (step_a, step_b):
        np.minimum.at(first, steps[best_first], place)
    return best_first[(first[step_a[best_first]] == place) & (first[step_b[best_first]] == place)]
