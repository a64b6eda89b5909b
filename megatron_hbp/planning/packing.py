"""Packing methods: put samples into packs of a fixed capacity. All share one signature.

    method(lengths int64 [n], capacity, rng) -> pack_of int64 [n], numbered from 0 without gaps

No method may exceed the capacity or leave a sample out; callers see to it that no sample is longer than `capacity`.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

PackingMethod = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def next_fit(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Close a pack as soon as the next sample does not fit; keeps the order given."""
    ends = np.cumsum(lengths).tolist()
    starts: list[int] = []
    first, filled = 0, 0
    while first < len(ends):
        starts.append(first)
        first = bisect_right(ends, filled + capacity)
        filled = ends[first - 1]
    pack_of = np.zeros(len(lengths), np.int64)
    pack_of[starts[1:]] = 1
    return np.cumsum(pack_of)


def random_packing(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Next-fit in random order: what shuffled packing amounts to."""
    order = rng.permutation(len(lengths))
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[order] = next_fit(lengths[order], capacity)
    return pack_of


def isf(lengths: np.ndarray, capacity: int, rng: np.random.Generator, *, rounds: int = 8) -> np.ndarray:
    """Iterative sampling and filtering (the paper's choice): keep the packs at least 98% full, draw the rest again."""
    pack_of = np.full(len(lengths), -1, np.int64)
    rest, num_packs = np.arange(len(lengths)), 0
    for is_last in [False] * rounds + [True]:
        drawn = random_packing(lengths[rest], capacity, rng)
        filled = np.bincount(drawn, lengths[rest])
        keep = np.full(len(filled), True) if is_last else filled >= 0.98 * capacity
        number = np.cumsum(keep) - 1 + num_packs
        kept = keep[drawn]
        pack_of[rest[kept]] = number[drawn[kept]]
        num_packs += int(keep.sum())
        rest = rest[~kept]
        if not len(rest):
            break
    return pack_of
