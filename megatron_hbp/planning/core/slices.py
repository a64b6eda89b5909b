"""Which samples of a shared pack lie on one rank only: their attention needs no exchange (as in Skrull, 2505.19609)."""

import numpy as np

from megatron_hbp.planning.core.tiers import Pack, Tier

SHARED = -1
"""Stands for a sample that lies on more than one rank of its gang."""


def cp_local_ranks(pack: Pack, tier: Tier) -> np.ndarray:
    """The gang's rank (from 0) that holds each sample whole, or SHARED: int32 [samples].

    The pack is padded at its end to equal slices in whole alignments. Contiguous: rank r holds slice r of c. Zigzag:
    rank r holds slices r and 2c - 1 - r of 2c.
    """
    num_slices = tier.cp_degree * (2 if tier.is_zigzag else 1)
    unit = num_slices * tier.alignment
    slice_tokens = -(-pack.num_tokens // unit) * tier.alignment
    first = pack.offsets // slice_tokens
    last = (pack.offsets + pack.lengths - 1) // slice_tokens
    rank = np.minimum(first, num_slices - 1 - first) if tier.is_zigzag else first
    return np.where(first == last, rank, SHARED).astype(np.int32)
