"""Slices of packs, checked against a brute-force reading of the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.feed.batch import slice_of_pack
from megatron_hbp.planning.core.slices import PADDING_SEGMENT, padded_length


def brute_force(samples, length, num_slices):
    """Token by token: (token, label, supervised, position) of the whole padded pack, and the segment starts."""
    rows, starts = [], [0]
    for tokens, mask in samples:
        for i, token in enumerate(tokens):
            last = i + 1 == len(tokens)
            rows.append((token, 0 if last else tokens[i + 1], False if last else bool(mask[i + 1]), i))
        starts.append(len(rows))
    while len(rows) < length:
        border = next(b for b in range(0, length + 1, length // num_slices) if b > len(rows))
        rows += [(0, 0, False, i) for i in range(min(PADDING_SEGMENT, border - len(rows)))]
        starts.append(len(rows))
    return rows, starts


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=8),
    cp_degree=st.sampled_from([1, 2, 3, 4, 6]),
    unit=st.sampled_from([1, 2, 16]),
    extra=st.integers(0, 20),
    seed=st.integers(0, 2**16),
    zigzag=st.booleans(),
)
def test_slices_match_the_definition(lengths, cp_degree, unit, extra, seed, zigzag):
    rng = np.random.default_rng(seed)
    samples = [(rng.integers(1, 99, n), rng.integers(0, 2, n)) for n in lengths]
    unit *= 1 + zigzag
    length = padded_length(sum(lengths), cp_degree=cp_degree, unit=unit) + extra * cp_degree * unit
    rows, starts = brute_force(samples, length, cp_degree * (1 + zigzag))

    cuts = [
        slice_of_pack(samples, padded_length=length, cp_degree=cp_degree, cp_rank=r, zigzag=zigzag)
        for r in range(cp_degree)
    ]
    s = length // cp_degree
    at = list(range(length))  # position in the pack of every token, in rank order
    if zigzag:
        half = s // 2
        slices = [at[i * half : (i + 1) * half] for i in range(2 * cp_degree)]
        at = [i for r in range(cp_degree) for i in slices[r] + slices[2 * cp_degree - 1 - r]]

    assert [int(t) for cut in cuts for t in cut.tokens] == [rows[i][0] for i in at]
    assert [int(p) for cut in cuts for p in cut.position_ids] == [rows[i][3] for i in at]
    supervised = [r * s + int(i) for r, cut in enumerate(cuts) for i in cut.supervised]
    assert supervised == [i for i, place in enumerate(at) if rows[place][2]]
    for cut in cuts:
        assert cut.cu_seqlens.tolist() == starts
        assert cut.sample_tokens.tolist() == (lengths or [0])
    assert [bool(x) for cut in cuts for x in cut.is_real] == [i < sum(lengths) for i in at]
    owner = [j for j, n in enumerate(lengths) for _ in range(n)]
    found = dict(zip(at, (int(j) for cut in cuts for j in cut.sample_index), strict=True))
    assert [found[i] for i in range(len(owner))] == owner
    counts = [sum(row[2] for row, j in zip(rows, owner, strict=False) if j == k) for k in range(max(len(lengths), 1))]
    assert cuts[0].sample_supervised.tolist() == counts


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    cp_degree=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**16),
)
def test_supervised_rows_are_distributed_evenly_and_meet_their_labels(lengths, cp_degree, seed):
    rng = np.random.default_rng(seed)
    samples = [(rng.integers(1, 99, n), rng.integers(0, 2, n)) for n in lengths]
    length = padded_length(sum(lengths), cp_degree=cp_degree, unit=1)
    rows, _ = brute_force(samples, length, cp_degree)
    cuts = [slice_of_pack(samples, padded_length=length, cp_degree=cp_degree, cp_rank=r) for r in range(cp_degree)]

    inbox: list[list[int]] = [[] for _ in range(cp_degree)]  # the all-to-all, by hand
    for sender, cut in enumerate(cuts):
        outgoing = [sender * length // cp_degree + int(i) for i in cut.supervised]
        assert sum(cut.rows_to) == len(outgoing)
        for receiver, count in enumerate(cut.rows_to):
            assert cuts[receiver].rows_from[sender] == count
            inbox[receiver] += outgoing[:count]
            outgoing = outgoing[count:]

    assert [i for box in inbox for i in box] == [i for i, row in enumerate(rows) if row[2]]
    for box, cut in zip(inbox, cuts, strict=True):
        assert [int(label) for label in cut.labels] == [rows[i][1] for i in box]
    sizes = [len(box) for box in inbox]
    assert max(sizes) - min(sizes) <= 1


def test_by_hand():
    samples = [
        (np.array([7, 8, 9]), np.array([0, 1, 1])),
        (np.array([5]), np.array([1])),
        (np.array([3, 4]), np.array([0, 1])),
    ]
    left, right = (slice_of_pack(samples, padded_length=8, cp_degree=2, cp_rank=r) for r in (0, 1))

    assert left.tokens.tolist() == [7, 8, 9, 5] and right.tokens.tolist() == [3, 4, 0, 0]
    assert left.supervised.tolist() == [0, 1] and right.supervised.tolist() == [0]
    assert left.rows_to == (1, 1) and right.rows_to == (0, 1)  # three losses: the left computes one, the right two
    assert left.rows_from == (1, 0) and right.rows_from == (1, 1)
    assert left.labels.tolist() == [8] and right.labels.tolist() == [9, 4]
    assert left.position_ids.tolist() == [0, 1, 2, 0] and right.position_ids.tolist() == [0, 1, 0, 1]
    assert left.cu_seqlens.tolist() == right.cu_seqlens.tolist() == [0, 3, 4, 6, 8]


@pytest.mark.parametrize("num_tokens, expected", [(0, 8), (1, 8), (8, 8), (9, 16)])
def test_padding_is_least(num_tokens, expected):
    assert padded_length(num_tokens, cp_degree=4, unit=2) == expected
