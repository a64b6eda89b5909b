"""How the tokens of a pack lie on the ranks of its gang, and which samples need no exchange there.

Samples that lie on one rank need no exchange. They stay *local* as long as that keeps the ranks' work even (as in
Skrull, arXiv 2505.19609); the other samples of a pack are *shared*.

Legend: `c` CP degree, `t` tokens of the padded pack, `s` = t / c tokens of a rank, `n` segments of the pack: samples,
then pieces of padding. Layouts: a rank holds one slice of c (contiguous), or slices r and 2c - 1 - r of 2c (zigzag).
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from megatron_hbp.planning.core.plan import Pack
from megatron_hbp.planning.core.tiers import Tier

UNEVENNESS = 0.02
"""Work that local samples may add to the fullest rank, as a share of the pack's work per rank. The exchange that they
save is a few percent of a layer; a 16K sample on one of 8 ranks alone would cost its owner 8 times its share."""

PADDING_SEGMENT = 128
"""Padding attends to itself in pieces of this many tokens: one piece would cost its square (PP pads to capacity)."""


class _Layout(TypedDict):
    cp_degree: int
    zigzag: bool


def padded_length(num_tokens: int, *, cp_degree: int, unit: int) -> int:
    """Length of a pack padded so that each of `cp_degree` slices is a multiple of `unit`; at least one unit each."""
    block = cp_degree * unit
    return max(1, -(-num_tokens // block)) * block


def unit_of(tier: Tier, unit: int = 1) -> int:
    """What a rank's tokens are a multiple of: `unit`, the tier's alignment, two mirrored slices."""
    return math.lcm(unit, tier.alignment) * (2 if tier.is_zigzag else 1)


def local_positions(t: int, *, cp_degree: int, zigzag: bool) -> np.ndarray:
    """Positions in the pack of each rank's tokens, in local order: int64 [c, s]."""
    if not zigzag:
        return np.arange(t).reshape(cp_degree, -1)
    slices = np.arange(t).reshape(2 * cp_degree, -1)
    return np.concatenate((slices[:cp_degree], slices[: cp_degree - 1 : -1]), axis=1)


def segment_starts(lengths: Sequence[int] | np.ndarray, t: int, *, cp_degree: int, zigzag: bool) -> np.ndarray:
    """`cu_seqlens` int32 [n + 1] of samples of `lengths` and of the padding behind them, up to the end t.

    No piece of padding reaches over a slice's border: it would have to be exchanged.
    """
    starts = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    border, end = t // (cp_degree * (2 if zigzag else 1)), starts[-1]
    while end < t:
        end = min(end + PADDING_SEGMENT, (end // border + 1) * border)
        starts.append(end)
    return np.array(starts, np.int32)


def owner_of_tokens(positions: np.ndarray) -> np.ndarray:
    """The gang's rank, from 0, that holds each token of the pack: int64 [t], from `local_positions`."""
    owner = np.empty(positions.size, np.int64)
    owner[positions] = np.arange(len(positions))[:, None]
    return owner


def stays_local(cu_seqlens: np.ndarray, owner: np.ndarray, cp_degree: int) -> np.ndarray:
    """bool [n]: segments on one rank that stay there; on each rank the shortest, up to one level of work for all.

    `cu_seqlens` int [n + 1], `owner` int64 [t]. All ranks of a gang compute the same answer: it follows from the pack.
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


def local_ranks(pack: Pack, tier: Tier) -> np.ndarray:
    """The gang's rank, from 0, that attends to each sample alone; -1 where ranks share it: int64 [samples]."""
    layout: _Layout = {"cp_degree": tier.cp_degree, "zigzag": tier.is_zigzag}
    t = padded_length(pack.num_tokens, cp_degree=tier.cp_degree, unit=unit_of(tier))
    cu_seqlens = segment_starts(pack.lengths, t, **layout)
    owner = owner_of_tokens(local_positions(t, **layout))
    stay = stays_local(cu_seqlens, owner, tier.cp_degree)
    return np.where(stay, owner[cu_seqlens[:-1]], -1)[: len(pack.lengths)]
