"""From the samples of a pack to one rank's slice of it. numpy only, no ranks, no groups: easy to check by hand.

Legend: `t` tokens of the padded pack, `s` = t / c tokens of one rank's contiguous slice, `n` segments (samples, then
padding), `r` supervised positions of the slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Padding attends to itself in pieces of this many tokens: one long piece would cost its square (PP pads to capacity).
PADDING_SEGMENT = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class PackSlice:
    """One rank's share of a padded pack."""

    tokens: np.ndarray
    """int64 [s]; padding is token 0."""
    labels: np.ndarray
    """int64 [s]: the token after each one in its own sample, 0 where there is none."""
    supervised: np.ndarray
    """int64 [r], positions in [0, s) whose label counts in the loss."""
    position_ids: np.ndarray
    """int64 [s], positions inside the sample, 0 at every sample's start."""
    cu_seqlens: np.ndarray
    """int32 [n + 1], starts of the segments of the *whole* pack, and its end t."""
    num_real_tokens: int
    """Tokens of this slice that are not padding."""


def slice_of_pack(
    samples: Sequence[tuple[np.ndarray, np.ndarray]], *, padded_length: int, cp_degree: int, cp_rank: int
) -> PackSlice:
    """The contiguous slice of rank `cp_rank` of a pack.

    Args:
        samples: (tokens int [length], loss mask [length]) of each sample in pack order; mask[i] = 1 says that token i
            is to be predicted, so position i - 1 is supervised. A sample's first token is never predicted.
        padded_length: t, a multiple of `cp_degree` and no less than the samples' tokens.
        cp_degree: ranks that share the pack.
        cp_rank: which of them this is.
    """
    tokens, labels, positions = (np.zeros(padded_length, np.int64) for _ in range(3))
    supervised = np.zeros(padded_length, bool)
    starts, end = [0], 0
    for sample_tokens, loss_mask in samples:
        start, end = end, end + len(sample_tokens)
        tokens[start:end] = sample_tokens
        labels[start : end - 1] = sample_tokens[1:]
        supervised[start : end - 1] = loss_mask[1:]
        positions[start:end] = np.arange(end - start)
        starts.append(end)
    num_tokens = end
    while end < padded_length:
        start, end = end, min(end + PADDING_SEGMENT, padded_length)
        positions[start:end] = np.arange(end - start)
        starts.append(end)

    s = padded_length // cp_degree
    mine = slice(cp_rank * s, (cp_rank + 1) * s)
    return PackSlice(
        tokens=tokens[mine],
        labels=labels[mine],
        supervised=np.flatnonzero(supervised[mine]),
        position_ids=positions[mine],
        cu_seqlens=np.array(starts, np.int32),
        num_real_tokens=int(np.clip(num_tokens - mine.start, 0, s)),
    )


def padded_length(num_tokens: int, *, cp_degree: int, unit: int) -> int:
    """Length of a pack padded so that each of `cp_degree` slices is a multiple of `unit`; at least one unit each."""
    block = cp_degree * unit
    return max(1, -(-num_tokens // block)) * block
