"""The analytic search against brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.select.search import chain_seconds, grid, nodes, search

COST = preset("llama3.1-8b-h100")
MEMORY = COST.recompute_layers


def covers(chain, lengths):
    grow = all(a.packing_length < b.packing_length and a.cp_degree <= b.cp_degree for a, b in itertools.pairwise(chain))
    edges = [0, *(tier.packing_length for tier in chain)]
    return grow and edges[-2] < lengths.max() <= edges[-1] and np.histogram(lengths, np.add(edges, 1))[0].all()


@pytest.mark.parametrize("fixed", [0.02, 0.19])
def test_search_agrees_with_brute_force(fixed):
    lengths = np.concatenate([generate("tulu3", num_samples=2000), generate("longcite", num_samples=60)])
    lengths = lengths[lengths <= 65536]
    cost = replace(COST, micro_batch_seconds=fixed)
    settings = nodes((4096, 16384, 32768, 65536), (1, 4, 8), cost=cost, lengths=lengths)
    best = min(
        (
            (chain_seconds(chain, lengths, cost, 8), chain)
            for count in range(1, 5)
            for chain in itertools.combinations(settings, count)
            if covers(chain, lengths)
        ),
        key=lambda pair: pair[0],
    )
    found = search(lengths, settings, cost, 8, keep=1)[0]
    assert found.tiers == best[1]
    assert found.seconds == pytest.approx(best[0])
    equal = search(lengths, settings, cost, 8, keep=3, equal_local_tokens=True)
    assert equal and all(len({tier.local_tokens for tier in chain.tiers}) == 1 for chain in equal)


def test_room_is_filled_with_no_more_than_there_is():
    lengths = np.concatenate([np.full(20, 100), np.full(60, 12_000)])  # 2,000 tokens for 60 times 4,384 of room
    tiers = parse_tiers("2048:cp1,16384:cp1:full28")
    alone = sum(
        float(COST.tier_cost(tier).seconds(tokens, squares)) * count
        for tier, tokens, squares, count in ((tiers[0], 2000, 20 * 100**2, 1), (tiers[1], 12_000, 12_000**2, 60))
    )
    assert chain_seconds(tiers, lengths, COST, 1) == pytest.approx(alone, rel=0.01)


def test_grid_reaches_the_longest_and_is_no_longer_than_it_must():
    lengths = grid(100_001, (1, 2, 4, 8), MEMORY)
    assert lengths[-1] == 131072 and 100_096 in lengths and lengths[0] == 2048
    assert {4096, 6144, 8192, 12288} <= set(lengths)
