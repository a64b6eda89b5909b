"""How the tokens of a pack lie on the ranks of its gang, and which samples need no exchange there.

Samples that lie on one rank need no exchange. They stay *local* as long as that keeps the ranks' work even (as in
Skrull, arXiv 2505.19609); the other samples of a pack are *shared*.

Legend: `c` CP degree, `t` tokens of the padded pack, `s` = t / c tokens of a rank, `n` segments of the pack: samples,
then pieces of padding. Layouts: a rank holds one slice of c (contiguous), or slices r and 2c - 1 - r of 2c (zigzag).
"""

import math

import numpy as np

from megatron_hbp.planning.core.plan import Pack
from megatron_hbp.planning.core.tiers import Tier

UNEVENNESS = 0.02
"""Work that local samples may add to the fullest rank, as a share of the pack's work per rank. The exchange that they
save is a few percent of a layer; a 16K sample on one of 8 ranks alone would cost its owner 8 times its share."""

PADDING_SEGMENT = 128
"""Padding attends to itself in pieces of this many tokens: one piece would cost its square (PP pads to capacity)."""


def padded_length(num_tokens: int, tier: Tier, *, unit: int = 1) -> int:
    """Length t of a pack of `num_tokens`: equal slices in multiples of `unit` and the alignment, one at least."""
    block = tier.cp_degree * math.lcm(unit, tier.alignment) * (2 if tier.is_zigzag else 1)
    return max(1, -(-num_tokens // block)) * block


def slice_length(t: int, tier: Tier) -> int:
    """Tokens of one contiguous slice."""
    return t // (tier.cp_degree * (2 if tier.is_zigzag else 1))


def local_positions(t: int, tier: Tier) -> np.ndarray:
    """Positions in the pack of each rank's tokens, in local order: int64 [c, s]."""
    c = tier.cp_degree
    if not tier.is_zigzag:
        return np.arange(t).reshape(c, -1)
    slices = np.arange(t).reshape(2 * c, -1)
    return np.concatenate((slices[:c], slices[: c - 1 : -1]), axis=1)


def segment_starts(lengths: np.ndarray, t: int, tier: Tier) -> np.ndarray:
    """`cu_seqlens` int32 [n + 1] of samples of `lengths` and of the padding behind them, and the end t.

    No piece of padding reaches over a slice's border: it would have to be exchanged.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    border, position = slice_length(t, tier), int(ends[-1]) if len(ends) else 0
    starts = [0, *ends.tolist()]
    while position < t:
        position = min(position + PADDING_SEGMENT, (position // border + 1) * border, t)
        starts.append(position)
    return np.array(starts, np.int32)


def owner_of_tokens(t: int, tier: Tier) -> np.ndarray:
    """The gang's rank, from 0, that holds each token of the pack: int64 [t]."""
    owner = np.empty(t, np.int64)
    owner[local_positions(t, tier)] = np.arange(tier.cp_degree)[:, None]
    return owner


def stays_local(cu_seqlens: np.ndarray, owner: np.ndarray, cp_degree: int) -> np.ndarray:
    """bool [n]: segments on one rank that stay there; on each rank the shortest, up to one level of work for all.

    `cu_seqlens` int [n + 1], `owner` int64 [t]. All ranks of a gang come to the same answer: it follows from the pack.
    """
    first, last = cu_seqlens[:-1], cu_seqlens[1:] - 1
    lengths = np.diff(cu_seqlens).astype(np.float64)
    # one rank at both ends is not enough under zigzag, where another rank's slices may lie between
    changes = np.concatenate(([0], np.cumsum(owner[1:] != owner[:-1])))
    whole = changes[first] == changes[last]
    work = lengths**2
    allowed = UNEVENNESS * work.sum() / cp_degree
    holder = owner[first]
    by_length = np.argsort(lengths, kind="stable")
    piled = np.zeros_like(work)  # local work of the holder, this segment and all shorter ones included
    for rank in range(cp_degree):
        held = by_length[(whole & (holder == rank))[by_length]]
        piled[held] = np.cumsum(work[held])
    level = work.sum() / cp_degree
    for _ in range(30):
        stay = whole & (piled <= level)
        local = np.bincount(holder[stay], weights=work[stay], minlength=cp_degree)
        if local.max() - local.mean() <= allowed:
            return stay
        level *= 0.7
    return np.zeros(len(whole), bool)


def local_ranks(pack: Pack, tier: Tier, *, unit: int = 1) -> np.ndarray:
    """The gang's rank, from 0, that attends to each sample alone; -1 where ranks share it: int64 [samples]."""
    t = padded_length(pack.num_tokens, tier, unit=unit)
    cu_seqlens, owner = segment_starts(pack.lengths, t, tier), owner_of_tokens(t, tier)
    stay = stays_local(cu_seqlens, owner, tier.cp_degree)
    return np.where(stay, owner[cu_seqlens[:-1]], -1)[: len(pack.lengths)]
