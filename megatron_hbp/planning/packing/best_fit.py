"""Pack long samples by the closest fit, before anything short is near them.

Room that long samples leave in a pack is filled with short ones, and those then pay for an exchange they do not need:
best-fit decreasing left 2.5% of such room on the Tulu-3 + LongCite lengths, this leaves 1.8%.
"""

from bisect import bisect_left, insort

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Longest first, each into the fullest pack that still holds it: pack_of int64 [n]."""
    return best_fit_in_order(lengths, capacity, longest_first(lengths))


def best_fit_in_order(lengths: np.ndarray, capacity: int, order: np.ndarray) -> np.ndarray:
    """Samples in `order` int64 [n], each into the fullest pack that still holds it: pack_of int64 [n]."""
    pack_of = np.empty(len(lengths), np.int64)
    rooms: list[tuple[int, int]] = []
    num_packs = 0
    sizes = lengths.tolist()
    for sample in order.tolist():
        size = sizes[sample]
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = capacity, num_packs
            num_packs += 1
        pack_of[sample] = pack
        if room > size:
            insort(rooms, (room - size, pack))
    return pack_of


def closest_fit(lengths: np.ndarray, num_own: int, capacity: int, spare: int) -> np.ndarray:
    """Fill one pack after the other: its longest sample first, the last two chosen together for the closest fit.

    `lengths` int64 [n] sorted, longest first; the first `num_own` must be packed and open packs, the others may join
    them. `spare` tokens are kept free in each pack for short samples (see distribute.py), which evens out the content
    of steps. Returns pack_of int64 [n], -1 for others that did not join.
    """
    pack_of = np.full(len(lengths), -1, np.int64)
    # Ascending and padded, so that the unused part is one sorted array.
    unused = np.arange(len(lengths))[::-1]
    sizes = lengths[::-1]
    num_packs = 0
    while len(unused) and unused[-1] < num_own:
        chosen = _fill_one(sizes, capacity, spare)
        pack_of[unused[chosen]] = num_packs
        num_packs += 1
        keep = np.full(len(unused), True)
        keep[chosen] = False
        unused, sizes = unused[keep], sizes[keep]
    if num_own == len(lengths):  # without others to finish packs with, best-fit decreasing may need fewer
        usable = capacity - spare
        plain = best_fit_decreasing(np.minimum(lengths, usable), usable)
        return plain if plain.max(initial=-1) + 1 < num_packs else pack_of
    return pack_of


def _fill_one(sizes: np.ndarray, capacity: int, spare: int) -> list[int]:
    """Indices into `sizes` (ascending) of one pack's samples; the longest is always among them."""
    end = len(sizes) - 1
    chosen = [end]
    room = capacity - spare - int(sizes[end])
    shortest = int(sizes[0])
    while end and room >= 3 * shortest:  # leave two to be chosen together
        end = min(end, int(np.searchsorted(sizes, room - 2 * shortest, "right"))) - 1
        chosen.append(end)
        room -= int(sizes[end])
    others = np.delete(np.arange(len(sizes)), chosen)
    return chosen + others[_closest_pair(sizes[others], room)].tolist()


def _closest_pair(sizes: np.ndarray, room: int) -> list[int]:
    """At most two different indices into `sizes` (ascending) whose sum comes closest to `room` from below."""
    single = int(np.searchsorted(sizes, room, "right")) - 1
    if single < 0:
        return []
    first = np.arange(np.searchsorted(sizes, room // 2, "right"))
    second = np.searchsorted(sizes, room - sizes[first], "right") - 1
    differ = second > first
    first, second = first[differ], second[differ]
    if len(first):
        slack = room - sizes[first] - sizes[second]
        best = int(slack.argmin())
        if slack[best] < room - sizes[single]:
            return [int(first[best]), int(second[best])]
    return [single]
