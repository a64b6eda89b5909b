"""Hypothesis generators shared by the property tests."""

import numpy as np
from hypothesis import strategies as st

from megatron_hbp.planning import Request, Samples, Tier


@st.composite
def tier_sets(draw, max_ranks: int = 16):
    """(tiers, num_ranks): one to four tiers that grow, CP degrees dividing the ranks, not only powers of two."""
    num_ranks = draw(st.integers(1, max_ranks))
    divisors = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
    degrees = sorted(draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=4)))
    tiers, longest = [], 0
    for degree in degrees:
        local = draw(st.integers(max(1, longest // degree + 1), longest // degree + 64))
        longest = local * degree
        tiers.append(Tier(packing_length=longest, cp_degree=degree))
    return tuple(tiers), num_ranks


@st.composite
def planning_cases(draw, max_samples: int = 120):
    """(samples, request): lengths are any mix of uniform, boundary and constant ones."""
    tiers, num_ranks = draw(tier_sets())
    limit = tiers[-1].packing_length
    boundaries = [length for tier in tiers for length in (tier.packing_length - 1, tier.packing_length)]
    boundaries += [tier.packing_length + 1 for tier in tiers[:-1]] + [1]
    one = st.integers(1, limit) | st.sampled_from([max(1, length) for length in boundaries])
    lengths = draw(st.lists(one, min_size=1, max_size=max_samples))
    request = Request(
        tiers=tiers,
        num_ranks=num_ranks,
        step_tokens=draw(st.integers(1, 4 * num_ranks * limit)),
        seed=draw(st.integers(0, 3)),
    )
    return Samples.of(np.array(lengths, np.int64)), request
