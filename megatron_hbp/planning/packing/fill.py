"""GreedyFill (paper, algorithm 6): fill the room left in packs with shorter samples, in near-linear time."""

import itertools

import numpy as np

from megatron_hbp.planning.core.arrays import longest_first


def best_fit(room: np.ndarray, descending: np.ndarray) -> np.ndarray:
    """Give every gap the longest unused sample that fits, the widest gap first.

    `room` int64 [gaps] are tokens left, `descending` int64 [n] are lengths, longest first. Returns int64 [gaps]: index
    into `descending`, or -1 where nothing fits. One sort instead of a search per gap: going down the gaps, the choice
    is max(longest that fits, one after the last choice), which is a running maximum.
    """
    widest_first = np.argsort(-room, kind="stable")
    fits = np.searchsorted(-descending, -room[widest_first], "left")
    place = np.arange(len(room))
    chosen = np.maximum.accumulate(fits - place) + place
    result = np.empty(len(room), np.int64)
    result[widest_first] = np.where(chosen < len(descending), chosen, -1)
    return result


def exact_fit(room: np.ndarray, descending: np.ndarray) -> np.ndarray:
    """Pair gaps with samples of exactly their size, the k-th of each size with the k-th: as `best_fit`."""
    order = np.argsort(room, kind="stable")
    values = room[order]
    copy = np.arange(len(values)) - np.searchsorted(values, values, "left")
    place = np.searchsorted(-descending, -values, "left") + copy
    place[place >= len(descending)] = 0
    result = np.empty(len(room), np.int64)
    result[order] = np.where(descending[place] == values, place, -1)
    return result


def greedy_fill(room: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Fill gaps `room` int64 [gaps] with samples `lengths` int64 [n], longest first: gap of each sample [n], or -1.

    Each pass gives every gap at most one sample. As it takes the longest that fits, rooms at least halve or the samples
    run out, so that passes are few. Gaps that a sample fills to the token are served first: pairing the k-th gap with
    the k-th sample would leave a few tokens in each.
    """
    gap_of = np.full(len(lengths), -1, np.int64)
    unused = longest_first(lengths)
    room = room.copy()
    open_gaps = np.flatnonzero(room > 0)
    for fit in itertools.cycle((exact_fit, best_fit)):
        if not (len(open_gaps) and len(unused)):
            break
        chosen = fit(room[open_gaps], lengths[unused])
        served = chosen >= 0
        gaps, samples = open_gaps[served], unused[chosen[served]]
        gap_of[samples] = gaps
        room[gaps] -= lengths[samples]
        unused = np.delete(unused, chosen[served])
        # After best_fit a gap that was not served fits nothing any more.
        open_gaps = open_gaps[(room[open_gaps] > 0) & (served | (fit is exact_fit))]
    return gap_of
