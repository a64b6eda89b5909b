"""Which attention of a pack a rank computes alone, and which it shares with the ranks of its group, as tensors.

The *shared* samples form a pack of their own, which the exchanges work on; the others are *local*. Who is which is
decided in planning/core/slices.py.

Legend: `c` CP degree, `s` local tokens, `x` tokens of the shared samples, of which this rank holds `x_r`, `n` segments
of the pack (samples, then pieces of padding).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_hbp.planning.core.slices import local_positions, owner_of_tokens, stays_local


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Causal pieces for a kernel: queries [q[i], q[i+1]) see keys [k[i], k[i+1]), both aligned at their ends."""

    q: tuple[int, ...]
    """Where the query pieces start, and their end."""
    k: tuple[int, ...]
    """Where the key pieces start, and their end."""
    cu_q: torch.Tensor
    """`q` as int32 on the device."""
    cu_k: torch.Tensor
    """`k` as int32 on the device."""
    max_q: int
    max_k: int

    @staticmethod
    def of(q: Sequence[int], k: Sequence[int] | None = None, *, device: torch.device) -> "Segments":
        """From the starts of the pieces and their end; without `k`, keys are those of the queries."""
        k = q if k is None else k
        return Segments(
            q=tuple(q),
            k=tuple(k),
            cu_q=torch.tensor(q, dtype=torch.int32).to(device, non_blocking=True),
            cu_k=torch.tensor(k, dtype=torch.int32).to(device, non_blocking=True),
            max_q=max((b - a for a, b in pairwise(q)), default=0),
            max_k=max((b - a for a, b in pairwise(k)), default=0),
        )

    def of_queries(self) -> "Segments":
        """The same pieces of the queries with only their own keys: the last ones of each piece of keys."""
        return Segments(q=self.q, k=self.q, cu_q=self.cu_q, cu_k=self.cu_q, max_q=self.max_q, max_k=self.max_q)


@dataclass(frozen=True, kw_only=True, eq=False)
class Range:
    """Queries [start, end) of the shared pack that lie on this rank, and the keys they see."""

    start: int
    end: int
    key_start: int
    """First token of the first sample that reaches into the range: it sees keys [key_start, end)."""
    segments: Segments
    """Relative to `start` and `key_start`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """The shared samples as a pack of their own, in the order of the whole pack."""

    counts: tuple[int, ...]
    """[c]: x_r of every rank."""
    to_pack: torch.Tensor | None
    """int64 [x]: rows in rank order -> in the order of the pack; None where these are the same."""
    to_ranks: torch.Tensor | None
    """int64 [x]: the way back."""
    segments: Segments
    """The shared samples, all x tokens."""
    ranges: tuple[Range, ...]
    """What of it lies here, in local order: one range, under zigzag two."""
    ranges_of: tuple[tuple[tuple[int, int], ...], ...]
    """[c]: (start, end) of the ranges of every rank."""

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """int64 [x]: position of every token inside its own sample, in the order of the pack."""
        starts, x = self.segments.cu_q.long(), self.segments.q[-1]
        return torch.arange(x, device=starts.device) - starts[:-1].repeat_interleave(starts.diff(), output_size=x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One rank's attention of a pack."""

    local: Segments | None
    """Samples and padding that only this rank works on; None where there are none."""
    local_at: torch.Tensor | None
    """int64: their local positions; None where these are all [0, s)."""
    shared: Shared | None
    shared_at: torch.Tensor | None
    """int64 [x_r]: local positions of the shared samples; None where these are all."""
    back: torch.Tensor | None
    """int64 [s]: from (local, shared) rows to local positions."""


def rows_at(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """Rows `at` of x; all where `at` is None."""
    return x if at is None else x.index_select(0, at)


def split_pack(
    cu_seqlens: np.ndarray, *, num_tokens: int, cp_degree: int, cp_rank: int, zigzag: bool, device: torch.device
) -> Split:
    """Split the attention of a pack with segments `cu_seqlens` [n + 1] for rank `cp_rank`.

    Segments from `num_tokens` on are padding, which always stays local. All ranks of the group come to the same
    split: it follows from the pack alone.
    """
    if cp_degree == 1:
        whole = Segments.of(cu_seqlens.tolist(), device=device)
        return Split(local=whole, local_at=None, shared=None, shared_at=None, back=None)
    positions = local_positions(int(cu_seqlens[-1]), cp_degree=cp_degree, zigzag=zigzag)
    owner = owner_of_tokens(positions)
    is_padding = cu_seqlens[:-1] >= num_tokens
    is_shared = ~(stays_local(cu_seqlens, owner, cp_degree) | is_padding)  # [n]
    lengths = np.diff(cu_seqlens)
    token_shared = np.repeat(is_shared, lengths)  # [t]
    mine = positions[cp_rank]
    here = token_shared[mine]  # [s]
    local = _local(cu_seqlens, is_shared, owner, cp_rank, device)
    if not is_shared.any():
        return Split(local=local, local_at=None, shared=None, shared_at=None, back=None)

    starts = np.concatenate(([0], np.cumsum(lengths[is_shared])))
    index = np.cumsum(token_shared) - 1  # position in the pack -> in the shared pack
    rows = [index[held[token_shared[held]]] for held in positions]  # per rank, in local order
    order = np.concatenate(rows)
    in_order = bool((np.diff(order) == 1).all())
    ranges_of = tuple(_runs(held) for held in rows)
    shared = Shared(
        counts=tuple(len(held) for held in rows),
        to_pack=None if in_order else _tensor(np.argsort(order), device),
        to_ranks=None if in_order else _tensor(order, device),
        segments=Segments.of(starts.tolist(), device=device),
        ranges=tuple(_range(starts, start, end, device) for start, end in ranges_of[cp_rank]),
        ranges_of=ranges_of,
    )
    if here.all():
        return Split(local=None, local_at=None, shared=shared, shared_at=None, back=None)
    local_at, shared_at = np.flatnonzero(~here), np.flatnonzero(here)
    back = np.argsort(np.concatenate((local_at, shared_at)))
    return Split(
        local=local,
        local_at=_tensor(local_at, device),
        shared=shared,
        shared_at=_tensor(shared_at, device),
        back=_tensor(back, device),
    )


def _local(
    cu_seqlens: np.ndarray, is_shared: np.ndarray, owner: np.ndarray, cp_rank: int, device: torch.device
) -> Segments | None:
    here = ~is_shared & (owner[cu_seqlens[:-1]] == cp_rank)
    if not here.any():
        return None
    return Segments.of([0, *np.cumsum(np.diff(cu_seqlens)[here]).tolist()], device=device)


def _runs(rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    """[start, end) of each run of consecutive numbers."""
    if not len(rows):
        return ()
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks))


def _range(starts: np.ndarray, start: int, end: int, device: torch.device) -> Range:
    first = int(np.searchsorted(starts, start, side="right")) - 1
    inner = starts[(starts > start) & (starts < end)].tolist()
    key_start = int(starts[first])
    q, k = [start, *inner, end], [key_start, *inner, end]
    segments = Segments.of([a - start for a in q], [a - key_start for a in k], device=device)
    return Range(start=start, end=end, key_start=key_start, segments=segments)


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
