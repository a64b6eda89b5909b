"""Which samples stay at home and which are shared: against the definition, sample by sample."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.feed.batch import slice_of_pack
from megatron_hbp.model.split import split_pack
from megatron_hbp.planning.core.slices import UNEVENNESS, local_positions, padded_length

CPU = torch.device("cpu")


def splits_of(lengths, cp_degree, zigzag):
    """The split of every rank, where each one's tokens lie, and the segments."""
    unit = 1 + zigzag
    length = padded_length(sum(lengths), cp_degree=cp_degree, unit=unit)
    samples = [(np.ones(n, np.int64), np.ones(n, np.int64)) for n in lengths]
    ends = slice_of_pack(samples, padded_length=length, cp_degree=cp_degree, cp_rank=0, zigzag=zigzag).cu_seqlens
    return (
        [
            split_pack(ends, num_tokens=sum(lengths), cp_degree=cp_degree, cp_rank=r, zigzag=zigzag, device=CPU)
            for r in range(cp_degree)
        ],
        local_positions(length, cp_degree=cp_degree, zigzag=zigzag),
        ends,
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    cp_degree=st.sampled_from([1, 2, 3, 4]),
    zigzag=st.booleans(),
)
def test_every_token_is_at_home_or_shared_and_found_again(lengths, cp_degree, zigzag):
    splits, positions, ends = splits_of(lengths, cp_degree, zigzag)
    segment = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    in_shared = np.flatnonzero(np.isin(segment, _shared_segments(splits, positions, segment)))
    for rank, split in enumerate(splits):
        s = positions.shape[1]
        every = np.arange(s)
        local_at = every if split.local_at is None else split.local_at.numpy()
        shared_at = every if split.shared_at is None else split.shared_at.numpy()
        local_at = local_at if split.local is not None else every[:0]
        shared_at = shared_at if split.shared is not None else every[:0]
        assert sorted([*local_at, *shared_at]) == list(range(s))
        if split.back is not None:
            assert np.concatenate((local_at, shared_at))[split.back.numpy()].tolist() == list(range(s))
        if split.local is not None:  # whole segments, one after the other
            pieces = [positions[rank][local_at[a:b]] for a, b in zip(split.local.q, split.local.q[1:], strict=False)]
            for piece in pieces:
                assert piece.tolist() == list(range(ends[segment[piece[0]]], ends[segment[piece[0]] + 1]))
        if split.shared is None:
            continue
        assert split.shared.counts[rank] == len(shared_at)
        assert split.shared.segments.q[-1] == sum(split.shared.counts)
        rows = [i for a, b in split.shared.ranges_of[rank] for i in range(a, b)]
        assert in_shared[rows].tolist() == positions[rank][shared_at].tolist()
        for piece in split.shared.ranges:  # a query sees its sample from the start to itself
            assert piece.key_start == max(a for a in split.shared.segments.q if a <= piece.start)
            assert piece.segments.q[-1] == piece.end - piece.start
            assert piece.segments.k[-1] == piece.end - piece.key_start


def _shared_segments(splits, positions, segment):
    at = [
        positions[rank] if split.shared_at is None else positions[rank][split.shared_at.numpy()]
        for rank, split in enumerate(splits)
        if split.shared is not None
    ]
    return np.unique(segment[np.concatenate(at)]) if at else []


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    cp_degree=st.sampled_from([2, 3, 4]),
    zigzag=st.booleans(),
)
def test_work_at_home_is_even(lengths, cp_degree, zigzag):
    splits, _, ends = splits_of(lengths, cp_degree, zigzag)
    padding = ends[-1] - sum(lengths)
    at_home = [float(sum(np.diff(s.local.q) ** 2.0)) if s.local else 0.0 for s in splits]
    total = float((np.diff(ends) ** 2.0).sum())
    assert max(at_home) - np.mean(at_home) <= UNEVENNESS * total / cp_degree + padding**2


def test_a_pack_of_equal_short_samples_exchanges_nothing():
    splits, _, _ = splits_of([8] * 16, 4, False)
    assert all(split.shared is None for split in splits)


def test_a_long_sample_is_shared_and_its_short_neighbours_stay():
    splits, _, _ = splits_of([480] + [4] * 8, 4, False)
    assert all(split.shared.segments.q == (0, 480) for split in splits)
    assert [split.local and split.local.q for split in splits] == [None, None, None, tuple(range(0, 33, 4))]
