"""Which rank holds which tokens of a pack, and which samples one rank attends to alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.model.split import split_pack
from megatron_hbp.planning import Tier
from megatron_hbp.planning.core.plan import Pack
from megatron_hbp.planning.core.slices import (
    UNEVENNESS,
    local_positions,
    local_ranks,
    owner_of_tokens,
    padded_length,
    segment_starts,
    unit_of,
)


def pack_of(lengths):
    lengths = np.array(lengths, np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    ids = np.arange(len(lengths))
    return Pack(index=0, tier=0, step=0, slot=0, rank0=0, sample_ids=ids, lengths=lengths, offsets=offsets)


def tier_of(cp_degree, *, zigzag=False, alignment=1):
    return Tier(
        packing_length=2 * 840 * alignment, cp_degree=cp_degree, layout="zigzag" if zigzag else "contiguous",
        alignment=alignment,
    )  # fmt: skip


def length_of(num_tokens, tier):
    return padded_length(num_tokens, cp_degree=tier.cp_degree, unit=unit_of(tier))


def starts_of(pack, tier):
    t = length_of(pack.num_tokens, tier)
    return segment_starts(pack.lengths, t, cp_degree=tier.cp_degree, zigzag=tier.is_zigzag)


def plain_owner(num_tokens, tier):
    """The rank of each token, padded to whole slices of whole alignments."""
    num_slices = tier.cp_degree * (2 if tier.is_zigzag else 1)
    padded = -(-num_tokens // (num_slices * tier.alignment)) * num_slices * tier.alignment
    chunk = np.arange(padded) // (padded // num_slices)
    return np.minimum(chunk, num_slices - 1 - chunk) if tier.is_zigzag else chunk


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("alignment", [1, 4])
def test_tokens_lie_where_the_plain_form_puts_them(zigzag, alignment):
    tier = tier_of(3, zigzag=zigzag, alignment=alignment)
    for num_tokens in (1, 7, 100, 113):
        expected = plain_owner(num_tokens, tier)
        t = length_of(num_tokens, tier)
        assert t == len(expected)
        held = local_positions(t, cp_degree=3, zigzag=zigzag)
        assert owner_of_tokens(held).tolist() == expected.tolist()
        assert [held[rank].tolist() for rank in range(3)] == [np.flatnonzero(expected == r).tolist() for r in range(3)]


def test_slices_are_padded_to_the_unit_of_a_run_and_the_tiers_alignment():
    assert length_of(100, tier_of(2)) == 100
    assert length_of(101, tier_of(2, zigzag=True)) == 104
    assert unit_of(tier_of(2, alignment=6), 4) == 12
    assert length_of(0, tier_of(2, zigzag=True, alignment=8)) == 32


def test_padding_attends_to_itself_in_pieces_that_stay_inside_a_slice():
    starts = segment_starts([100, 30], 700, cp_degree=2, zigzag=False)
    assert starts.tolist() == [0, 100, 130, 258, 350, 478, 606, 700]
    mirrored = segment_starts([100, 30], 400, cp_degree=2, zigzag=True)
    assert mirrored.tolist() == [0, 100, 130, 200, 300, 400]
    assert segment_starts(np.array([700]), 700, cp_degree=2, zigzag=False).tolist() == [0, 700]


@pytest.mark.parametrize("zigzag", [False, True])
def test_local_samples_lie_on_their_rank_and_leave_the_work_even(zigzag):
    rng = np.random.default_rng(0)
    counts = [0, 0]
    for _ in range(200):
        tier = tier_of(int(rng.integers(2, 5)), zigzag=zigzag)
        pack = pack_of(rng.integers(1, 60, rng.integers(1, 30)))
        owner, local = plain_owner(pack.num_tokens, tier), local_ranks(pack, tier)
        work = np.zeros(tier.cp_degree)
        for rank, start, length in zip(local.tolist(), pack.offsets.tolist(), pack.lengths.tolist(), strict=True):
            counts[rank >= 0] += 1
            if rank >= 0:
                assert set(owner[start : start + length].tolist()) == {rank}
                work[rank] += length**2
        segments = np.diff(starts_of(pack, tier)).astype(float)
        padding = (segments[len(pack.lengths) :] ** 2).sum()
        assert work.max() - work.mean() <= UNEVENNESS * (segments**2).sum() / tier.cp_degree + padding
    assert min(counts) > 100  # both kinds were seen


def test_equal_short_samples_are_all_local_and_a_long_one_is_shared_beside_them():
    assert local_ranks(pack_of([8] * 16), tier_of(4)).tolist() == np.repeat(range(4), 4).tolist()
    assert local_ranks(pack_of([480] + [4] * 8), tier_of(4)).tolist() == [-1] + [3] * 8
    # a sample of 480 tokens alone on one of 4 ranks would take 4 times its share, though it lies there whole
    assert local_ranks(pack_of([480, 60]), tier_of(1)).tolist() == [0, 0]
    assert local_ranks(pack_of([48, 4, 4]), tier_of(2))[0] == -1


def as_the_run_time_splits(pack, tier):
    """For each sample the rank whose split keeps its tokens local; -1 where they are among the shared ones."""
    cu_seqlens = starts_of(pack, tier)
    layout = {"cp_degree": tier.cp_degree, "zigzag": tier.is_zigzag}
    held = local_positions(int(cu_seqlens[-1]), **layout)
    found = np.full(len(pack.lengths), -1)
    sample = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    for rank in range(tier.cp_degree):
        split = split_pack(
            cu_seqlens, num_tokens=pack.num_tokens, cp_rank=rank, device=torch.device("cpu"), **layout
        )  # fmt: skip
        if split.local is not None:
            at = slice(None) if split.local_at is None else split.local_at.numpy()
            here = np.unique(sample[held[rank][at]])
            found[here[here < len(found)]] = rank
    return found


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    cp_degree=st.sampled_from([2, 3, 4, 8]),
    zigzag=st.booleans(),
    alignment=st.sampled_from([1, 4]),
)
def test_local_ranks_are_those_of_the_run_time(lengths, cp_degree, zigzag, alignment):
    """Before, `plan show` called every sample local that lies on one rank, and the run time shared some of them."""
    pack, tier = pack_of(lengths), tier_of(cp_degree, zigzag=zigzag, alignment=alignment)
    assert local_ranks(pack, tier).tolist() == as_the_run_time_splits(pack, tier).tolist()
