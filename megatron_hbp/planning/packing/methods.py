"""Packing methods: put samples into packs of a fixed capacity. All share one signature.

    method(lengths int64 [n], capacity, rng) -> pack_of int64 [n], numbered from 0 without gaps

No method may exceed the capacity or leave a sample out; callers guarantee that no sample is longer than `capacity`.
"""

import heapq
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.arrays import longest_first
from megatron_hbp.planning.packing.best_fit import best_fit_in_order

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


def first_fit_decreasing(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Longest first, each into the first pack that holds it. A tree of rooms finds it in log time."""
    return _first_fit(lengths, capacity, longest_first(lengths))


def first_fit_shuffled(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Random order, each sample into the first pack that holds it."""
    return _first_fit(lengths, capacity, rng.permutation(len(lengths)))


def best_fit_shuffled(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Random order, each sample into the fullest pack that holds it."""
    return best_fit_in_order(lengths, capacity, rng.permutation(len(lengths)))


def shortest_pack_first(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Shortest-pack-first histogram packing (arXiv 2107.02027): longest first, each into the emptiest pack if it fits.

    Only the emptiest pack is looked at, so that a heap does.
    """
    pack_of = np.empty(len(lengths), np.int64)
    sizes = lengths.tolist()
    loads: list[tuple[int, int]] = []
    for sample in longest_first(lengths).tolist():
        size = sizes[sample]
        if loads and loads[0][0] + size <= capacity:
            load, pack = loads[0]
            heapq.heapreplace(loads, (load + size, pack))
        else:
            pack = len(loads)
            heapq.heappush(loads, (size, pack))
        pack_of[sample] = pack
    return pack_of


def sorted_batching(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Next-fit over samples in order of length."""
    order = longest_first(lengths)
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[order] = next_fit(lengths[order], capacity)
    return pack_of


def no_packing(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Each sample is a pack."""
    return np.arange(len(lengths))


def _first_fit(lengths: np.ndarray, capacity: int, order: np.ndarray) -> np.ndarray:
    """Each sample of `order` into the first pack with room, found in a binary tree of the largest rooms."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    tree = [capacity] * (2 * leaves)
    pack_of = np.empty(len(lengths), np.int64)
    sizes = lengths.tolist()
    for sample in order.tolist():
        size, node = sizes[sample], 1
        while node < leaves:
            node = 2 * node if tree[2 * node] >= size else 2 * node + 1
        pack_of[sample] = node - leaves
        tree[node] -= size
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return np.unique(pack_of, return_inverse=True)[1]


METHODS: dict[str, PackingMethod] = {
    "none": no_packing,
    "random": random_packing,
    "ISF": isf,
    "FFS": first_fit_shuffled,
    "FFD": first_fit_decreasing,
    "BFS": best_fit_shuffled,
    "SPFHP": shortest_pack_first,
    "sorted": sorted_batching,
}
"""Packing methods by the names of the paper's table 13: a function of the signature above and a line here."""


def packing_method(name: str) -> PackingMethod:
    """The method `name`. Raises ConfigError for an unknown one."""
    if name not in METHODS:
        raise ConfigError(f"unknown packing method {name!r}; there are balanced (ours), {', '.join(METHODS)}")
    return METHODS[name]
