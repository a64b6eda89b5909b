"""Search chains of tiers by an analytic epoch time, without packing anything: `search` -> the best few chains.

A chain l_1 < ... < l_n covers every sample: tier i owns those in (l_{i-1}, l_i]. Its packs are as many as its own
samples need; the room they leave is filled by samples of the first tier (GreedyFill), which then pay tier i's price
instead of their own. With w = cp_degree x coefficient (rank-seconds), P_i packs, T_i own tokens, S_i own squares:

    first tier   rate = (w_fixed P_1 + w_token T_1 + w_square S_1) / T_1 rank-seconds per token, cost rate T_1
    tier i       P_i w_fixed + (T_i + F_i) w_token + (S_i + F_i S_1 / T_1) w_square - F_i rate,  F_i = P_i l_i - T_i

Ranks share the sum evenly (balance leaves 0.1% idle, benchmarks/planning.md). Each term depends on two neighbours and
the first tier alone: one shortest path per first tier finds the best chain of every length. There the room is always
filled; chains are ranked by what is left where the first tier's samples run out, sum F_i > T_1. The estimate only
decides which chains are planned in earnest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.planning.cost.model import CostModel, MemoryTable, least_recompute
from megatron_hbp.planning.packing.best_fit import best_fit_decreasing
from megatron_hbp.planning.select.paper import mean_length

FULL = 0.999
"""Share of a pack that is filled: 0.03% is padding (benchmarks/planning.md), a margin for the last pack of a tier."""
PACKED_DRAW = 1000
"""Samples that decide how well a tier's own samples pack: 5 ms per pair of lengths, 1% of the packs off."""
MAX_TIERS = 10


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Tiers that cover the data, and their analytic epoch time."""

    tiers: tuple[Tier, ...]
    seconds: float
    """Rank-seconds over ranks; steps cost extra."""


def grid(longest: int, degrees: Sequence[int], memory: MemoryTable) -> tuple[int, ...]:
    """Packing lengths to choose from, growing, the last at least `longest` and at least what fits on one rank.

    Every local length of the memory table at every degree (more tokens with the same recompute is free of charge),
    powers of two and one and a half times them, and `longest` rounded up to what all degrees divide.
    """
    unit = int(np.lcm.reduce([256, *degrees]))
    needed = -(-longest // unit) * unit
    shortest = min(local for local, _ in memory)
    top = max(needed, 1 << (longest - 1).bit_length(), max(local for local, _ in memory))
    found = {needed} | {local * degree for local, _ in memory for degree in degrees}
    found |= {half << k for half in (2, 3) for k in range(top.bit_length())}
    return tuple(sorted(length for length in found if shortest <= length <= top or length == needed))


def nodes(
    packing_lengths: Sequence[int],
    degrees: Sequence[int],
    selective: Sequence[tuple[int, Recompute]] = (),
    *,
    cost: CostModel,
    lengths: np.ndarray,
) -> list[Tier]:
    """Every setting that fits, with the recompute that takes least time for packs of samples like `lengths` int [n].

    Of whole layers the fewest; `selective` are (local tokens up to which it fits, policy) to compare them with.
    """
    found = []
    for length in packing_lengths:
        mean = mean_length(lengths, length) if selective else 0.0
        for degree in (degree for degree in degrees if length % degree == 0):
            local, squares = length / degree, int(length * mean)
            policies = [
                least_recompute(cost.recompute_layers, local),
                *(policy for most, policy in selective if local <= most),
            ]
            tiers = [
                Tier(packing_length=length, cp_degree=degree, recompute=policy)
                for policy in policies
                if policy is not None
            ]
            if len(tiers) > 1:
                seconds = [float(cost.tier_cost(tier).seconds(length, squares)) for tier in tiers]
                tiers = [tiers[int(np.argmin(seconds))]]
            found += tiers
    return found


class Work:
    """What samples of each interval of lengths need; `of` is int64 [n], none longer than the last of `edges`."""

    def __init__(self, of: np.ndarray, edges: Sequence[int]) -> None:
        self.edges = tuple(edges)
        """Packing lengths, growing."""
        ordered = np.sort(of)
        places = np.searchsorted(ordered, [0, *edges], "right")
        sums = [np.concatenate([[0.0], np.cumsum(ordered.astype(float) ** power)])[places] for power in (1, 2)]
        # [low, high]: samples longer than edge low - 1 and at most edge high; row 0 is from 0 on.
        self.count, self.tokens, self.squares = (
            values[None, 1:] - values[:-1, None] for values in (places.astype(float), *sums)
        )
        self.packs = np.zeros_like(self.tokens)
        for low in range(len(edges)):
            for high in range(low, len(edges)):
                own = ordered[places[low] : places[high + 1]]
                if len(own):
                    self.packs[low, high] = num_packs(own, edges[high])


def num_packs(own: np.ndarray, capacity: int) -> float:
    """About how many packs of `capacity` samples `own` int64 [n], growing, need by themselves."""
    ideal = own.sum() / (capacity * FULL)
    # Below a tenth of a pack best-fit decreasing leaves less than the filler's 0.1%.
    if own[-1] * 10 <= capacity:
        return float(ideal)
    draw = own if len(own) <= PACKED_DRAW else np.random.default_rng(0).choice(own, PACKED_DRAW, replace=False)
    packs = int(best_fit_decreasing(draw, capacity).max()) + 1
    if len(draw) == len(own):
        return float(packs)
    return float(max(packs / draw.sum() * own.sum(), ideal))


class Prices:
    """Rank-seconds of nodes: coefficients times CP degree, float64 [nodes] each."""

    def __init__(self, tiers: Sequence[Tier], cost: CostModel) -> None:
        table = [(t.cp_degree * c.fixed, t.cp_degree * c.per_token, t.cp_degree * c.per_square)
                 for t in tiers for c in (cost.tier_cost(t),)]  # fmt: skip
        self.fixed, self.per_token, self.per_square = np.array(table).T


def first_rate(work: Work, prices: Prices, node: int, high: int) -> float:
    """Rank-seconds per token of the first tier `node`, whose length is edge `high`."""
    packs, tokens, squares = work.packs[0, high], work.tokens[0, high], work.squares[0, high]
    total = prices.fixed[node] * packs + prices.per_token[node] * tokens + prices.per_square[node] * squares
    return float(total / tokens)


class Links(NamedTuple):
    """What a tier adds behind another one, all [edges, nodes]: the node behind a tier whose length is that edge."""

    own: np.ndarray
    """Rank-seconds of its own samples; inf where it is not longer or owns nothing."""
    moved: np.ndarray
    """Rank-seconds that filling its packs with samples of the first tier adds: they run here, and no longer there."""
    filler: np.ndarray
    """Tokens of those samples."""


def link_costs(work: Work, prices: Prices, edge_of: np.ndarray, first: int) -> Links:
    """Links where node `first` is the first tier; `edge_of` int64 [nodes] is the edge of each node's length."""
    rate = first_rate(work, prices, first, int(edge_of[first]))
    mean = work.squares[0, edge_of[first]] / work.tokens[0, edge_of[first]]
    rows = np.arange(1, len(work.edges))[:, None]  # behind edge k - 1 comes row k of the intervals
    tokens, squares, packs = (values[rows, edge_of] for values in (work.tokens, work.squares, work.packs))
    filler = np.maximum(packs * np.array(work.edges)[edge_of] * FULL - tokens, 0.0)
    cost = packs * prices.fixed + tokens * prices.per_token + squares * prices.per_square
    moved = filler * (prices.per_token + mean * prices.per_square - rate)
    nothing = (edge_of[None, :] < rows) | (work.count[rows, edge_of] == 0)
    last = np.zeros(len(edge_of))  # behind the last edge comes nothing
    own = np.vstack([np.where(nothing, np.inf, cost), last + np.inf])
    return Links(own=own, moved=np.vstack([moved, last]), filler=np.vstack([filler, last]))


def path_seconds(path: Sequence[int], start: float, there: float, links: Links, edge_of: np.ndarray) -> float:
    """Rank-seconds of a chain: `start` of the first tier with all its samples, of which `there` tokens can move."""
    steps = [(int(edge_of[a]), b) for a, b in pairwise(path)]
    totals = [sum(float(values[step]) for step in steps) for values in links]
    own, moved, filler = totals
    return start + own + moved * min(1.0, there / filler if filler else 1.0)


def chain_seconds(tiers: Sequence[Tier], lengths: np.ndarray, cost: CostModel, num_ranks: int) -> float:
    """The analytic epoch time of one chain by itself; the search finds the least of it."""
    work = Work(lengths, [tier.packing_length for tier in tiers])
    prices = Prices(tiers, cost)
    edge_of = np.arange(len(tiers))
    there = float(work.tokens[0, 0])
    start = first_rate(work, prices, 0, 0) * there
    links = link_costs(work, prices, edge_of, 0)
    return path_seconds(range(len(tiers)), start, there, links, edge_of) / num_ranks


def search(
    lengths: np.ndarray,
    settings: Sequence[Tier],
    cost: CostModel,
    num_ranks: int,
    *,
    keep: int,
    equal_local_tokens: bool = False,
    max_tiers: int = MAX_TIERS,
) -> list[Chain]:
    """The `keep` best chains over `settings`, at most three that begin alike, best first; empty where none covers.

    A chain ends with the first tier that holds the longest sample.
    """
    settings = sorted(settings, key=lambda tier: (tier.packing_length, tier.cp_degree))
    edges = sorted({tier.packing_length for tier in settings})
    longest, shortest = int(lengths.max()), int(lengths.min())
    if not edges or edges[-1] < longest:
        return []
    work, prices = Work(lengths, edges), Prices(settings, cost)
    edge_of = np.searchsorted(edges, [tier.packing_length for tier in settings])
    degree = np.array([tier.cp_degree for tier in settings])
    local = np.array([tier.local_tokens for tier in settings])
    ends = np.array(edges)[edge_of] >= longest
    grows = (degree[:, None] <= degree) & ~ends[:, None]
    found: list[Chain] = []
    for first, tier in enumerate(settings):
        if tier.packing_length < shortest:
            continue
        links = link_costs(work, prices, edge_of, first)
        weights = np.where(grows, (links.own + links.moved)[edge_of], np.inf)
        if equal_local_tokens:
            weights[:, local != tier.local_tokens] = np.inf
        there = float(work.tokens[0, edge_of[first]])
        start = np.full(len(settings), np.inf)
        start[first] = first_rate(work, prices, first, int(edge_of[first])) * there
        chains = [
            Chain(
                tiers=tuple(settings[i] for i in path),
                seconds=path_seconds(path, start[first], there, links, edge_of) / num_ranks,
            )
            for path in _shortest_paths(start, weights, ends, max_tiers)
        ]
        found += sorted(chains, key=lambda chain: chain.seconds)[:3]
    return sorted(found, key=lambda chain: (chain.seconds, len(chain.tiers)))[:keep]


def _shortest_paths(start: np.ndarray, links: np.ndarray, ends: np.ndarray, max_tiers: int) -> list[list[int]]:
    """Nodes of the cheapest path of each number of nodes from `start` [nodes] to one that `ends`."""
    value = start
    parents: list[np.ndarray] = []
    found = []
    for _ in range(max_tiers):
        last = int(np.where(ends, value, np.inf).argmin())
        if np.isfinite(value[last]) and ends[last]:
            path = [last]
            for parent in reversed(parents):
                path.append(int(parent[path[-1]]))
            found.append(path[::-1])
        total = value[:, None] + links
        parents.append(total.argmin(axis=0))
        value = total.min(axis=0)
    return found
