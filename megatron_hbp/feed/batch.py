"""From the samples of a pack to one rank's slice of it. numpy only, no ranks, no groups: easy to check by hand.

Legend: `t` tokens of the padded pack, `c` ranks that share it, `s` = t / c tokens of one rank's slice, `n` samples. A
position is supervised where the token that follows it in its own sample is to be predicted; the pack has R of them, the
slice r. Documents end in their supervised part, so slices hold them very unequally: rank k computes the losses of the
supervised positions [k R / c, (k + 1) R / c), counted in rank order, wherever they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.slices import local_positions, segment_starts


@dataclass(frozen=True, kw_only=True, eq=False)
class PackSlice:
    """One rank's share of a padded pack."""

    tokens: np.ndarray
    """int64 [s]; padding is token 0."""
    position_ids: np.ndarray
    """int64 [s], positions inside the sample, 0 at every sample's start."""
    is_real: np.ndarray
    """bool [s], False for padding."""
    sample_index: np.ndarray
    """int64 [s], the sample of the pack that each token belongs to; padding has that of the last one."""
    supervised: np.ndarray
    """int64 [r], supervised positions in [0, s)."""
    rows_to: tuple[int, ...]
    """[c]: how many of the r, in order, rank k computes the loss of."""
    rows_from: tuple[int, ...]
    """[c]: how many supervised positions come here from rank k."""
    labels: np.ndarray
    """int64 [sum(rows_from)]: what the positions whose loss is computed here should predict."""
    cu_seqlens: np.ndarray
    """int32, starts of the segments of the *whole* pack, the samples and then pieces of padding, and its end t."""
    sample_tokens: np.ndarray
    """int64 [max(n, 1)], tokens of each sample of the whole pack."""
    sample_supervised: np.ndarray
    """int64 [max(n, 1)], supervised positions of each sample of the whole pack."""


def slice_of_pack(
    samples: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    padded_length: int,
    cp_degree: int,
    cp_rank: int,
    zigzag: bool = False,
) -> PackSlice:
    """The tokens of rank `cp_rank` of a pack.

    Args:
        samples: (tokens int [length], loss mask [length]) of each sample in pack order; mask[i] = 1 says that token i
            is to be predicted, so position i - 1 is supervised. A sample's first token is never predicted.
        padded_length: t, a multiple of `cp_degree` and no less than the samples' tokens.
        cp_degree: ranks that share the pack.
        cp_rank: which of them this is.
        zigzag: a rank holds two mirrored slices instead of one.
    """
    tokens, following = (np.zeros(padded_length, np.int64) for _ in range(2))
    is_supervised = np.zeros(padded_length, bool)
    end = 0
    for sample_tokens, loss_mask in samples:
        start, end = end, end + len(sample_tokens)
        tokens[start:end] = sample_tokens
        following[start : end - 1] = sample_tokens[1:]
        is_supervised[start : end - 1] = loss_mask[1:]
    num_tokens, num_samples = end, len(samples)
    cu_seqlens = segment_starts(
        [len(tokens) for tokens, _ in samples], padded_length, cp_degree=cp_degree, zigzag=zigzag
    )
    segment = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    positions = np.arange(padded_length) - cu_seqlens[segment]
    held = local_positions(padded_length, cp_degree=cp_degree, zigzag=zigzag)  # [c, s]
    sample_index = np.minimum(segment, max(num_samples - 1, 0))

    s, mine = padded_length // cp_degree, held[cp_rank]
    # loss rows in rank order: rank k holds [has[k], has[k + 1]) and computes [assigned[k], assigned[k + 1])
    order = held.reshape(-1)
    rows = np.flatnonzero(is_supervised[order])
    has = np.searchsorted(rows, np.arange(cp_degree + 1) * s)
    assigned = np.arange(cp_degree + 1) * len(rows) // cp_degree
    return PackSlice(
        tokens=tokens[mine],
        position_ids=positions[mine],
        is_real=mine < num_tokens,
        sample_index=sample_index[mine],
        supervised=rows[has[cp_rank] : has[cp_rank + 1]] - cp_rank * s,
        rows_to=_overlaps(has[cp_rank], has[cp_rank + 1], assigned),
        rows_from=_overlaps(assigned[cp_rank], assigned[cp_rank + 1], has),
        labels=following[order[rows[assigned[cp_rank] : assigned[cp_rank + 1]]]],
        cu_seqlens=cu_seqlens,
        sample_tokens=np.array([len(sample) for sample, _ in samples] or [0], np.int64),
        sample_supervised=np.bincount(sample_index[is_supervised], minlength=max(num_samples, 1)),
    )


def _overlaps(start: int, end: int, bounds: np.ndarray) -> tuple[int, ...]:
    """How much of [start, end) lies in each [bounds[k], bounds[k + 1])."""
    inside = np.clip(bounds, start, end)
    return tuple(np.diff(inside).tolist())
