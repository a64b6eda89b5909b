"""Karmarkar-Karp: split numbers into bins of nearly equal sums by largest differencing.

Source: Karmarkar and Karp, "The differencing method of set partitioning", 1982. A state holds k sums, largest first;
the two states of largest spread merge, the largest sum of one on the smallest of the other, until one is left. Only the
order of the sums is kept while merging (numpy), bins are read off by walking the merges back.
"""

import heapq

import numpy as np


def karmarkar_karp(costs: np.ndarray, num_bins: int, *, equal_counts: bool = False) -> np.ndarray:
    """Bin of each of `costs` float64 [n], int64 [n]. With `equal_counts` bins differ by at most one in their items."""
    if num_bins == 1 or not len(costs):
        return np.zeros(len(costs), np.int64)
    items = _first_states(costs, num_bins if equal_counts else 1)
    states: list[np.ndarray] = []
    for row in items:
        sums = np.zeros(num_bins)
        sums[: len(row)] = np.append(costs, 0.0)[row]
        states.append(sums)
    heap = [(float(sums[-1] - sums[0]), index) for index, sums in enumerate(states)]
    heapq.heapify(heap)
    merges: list[tuple[int, int, np.ndarray]] = []
    while len(heap) > 1:
        _, left = heapq.heappop(heap)
        _, right = heapq.heappop(heap)
        sums = states[left] + states[right][::-1]
        order = np.argsort(-sums, kind="stable")
        merges.append((left, right, order))
        states.append(sums[order])
        heapq.heappush(heap, (float(states[-1][-1] - states[-1][0]), len(states) - 1))

    bins = [np.arange(num_bins)] * len(states)  # all but the last are set when their merge is walked back
    for index in reversed(range(len(merges))):
        left, right, order = merges[index]
        whole = np.empty(num_bins, np.int64)
        whole[order] = bins[len(items) + index]
        bins[left], bins[right] = whole, whole[::-1]
    bin_of = np.empty(len(costs) + 1, np.int64)  # the last entry collects the padding
    for row, bin_of_place in zip(items, bins, strict=False):
        bin_of[row] = bin_of_place[: len(row)]
    return bin_of[:-1]


def _first_states(costs: np.ndarray, width: int) -> np.ndarray:
    """Items of each first state, int64 [states, width], largest first; padded with len(costs), an item of no cost."""
    order = np.argsort(-costs, kind="stable")
    padded = np.concatenate([order, np.full(-len(order) % width, len(costs))])
    return padded.reshape(-1, width)
