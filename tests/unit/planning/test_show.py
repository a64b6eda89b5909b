"""Plans as rows, and samples that one rank holds whole."""

import json

import numpy as np
import pytest

from megatron_hbp.planning import Tier, make_plan, parse_tiers
from megatron_hbp.planning.core.rows import plan_rows
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.slices import SHARED, cp_local_ranks
from megatron_hbp.planning.core.tiers import Pack
from megatron_hbp.planning.request import Request


def pack_of(lengths):
    lengths = np.array(lengths, np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    ids = np.arange(len(lengths))
    return Pack(index=0, tier=0, step=0, slot=0, rank0=0, sample_ids=ids, lengths=lengths, offsets=offsets)


def brute_force(pack, tier):
    """The rank of each token, padded to whole slices; a sample is local where that is one rank."""
    num_slices = tier.cp_degree * (2 if tier.layout == "zigzag" else 1)
    padded = -(-pack.num_tokens // (num_slices * tier.alignment)) * num_slices * tier.alignment
    chunk = np.arange(padded) // (padded // num_slices)
    rank = np.minimum(chunk, num_slices - 1 - chunk) if tier.layout == "zigzag" else chunk
    spans = [
        (rank[o : o + n], chunk[o : o + n]) for o, n in zip(pack.offsets.tolist(), pack.lengths.tolist(), strict=True)
    ]
    return [int(r[0]) if len(set(c.tolist())) == 1 else SHARED for r, c in spans]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("alignment", [1, 4])
def test_local_ranks_equal_brute_force(layout, alignment):
    rng = np.random.default_rng(0)
    tier = Tier(packing_length=192, cp_degree=3, layout=layout, alignment=alignment)
    for _ in range(50):
        pack = pack_of(rng.integers(1, 40, rng.integers(1, 5)))
        assert cp_local_ranks(pack, tier).tolist() == brute_force(pack, tier)


def test_rows_are_complete_and_plain_json():
    lengths = np.array([100, 900, 3000, 50, 60, 70, 2000])
    plan = make_plan(
        Samples.of(lengths), Request(tiers=parse_tiers("1024:cp1:full3,4096:cp4"), num_ranks=4, step_tokens=8192)
    )
    rows = [json.loads(json.dumps(row)) for row in plan_rows(plan)]
    assert sorted(sample for row in rows for sample in row["samples"]) == list(range(7))
    for row in rows:
        assert row["lengths"] == lengths[row["samples"]].tolist()
        assert row["offsets"] == [sum(row["lengths"][:i]) for i in range(len(row["lengths"]))]
        assert len(row["ranks"]) == row["cp_degree"] and sum(row["lengths"]) <= row["capacity"]
        shared = row["cp_degree"] > 1
        assert (row["cp_local_rank"] is not None) == shared
        assert row["recompute"] == (None if shared else {"granularity": "full", "layers": 3, "modules": []})


def test_short_samples_in_shared_packs_lie_behind_the_long_ones():
    lengths = np.concatenate([[3000, 2500, 3500], np.full(30, 20)])
    plan = make_plan(Samples.of(lengths), Request(tiers=parse_tiers("64:cp1,4096:cp4"), num_ranks=4, step_tokens=8192))
    for index in np.flatnonzero(plan.pack_cp > 1):
        pack = plan.pack(index)
        assert (np.diff(pack.lengths) <= 0).all()
        local = cp_local_ranks(pack, plan.tiers[pack.tier])
        assert (local[pack.lengths == 20] == SHARED).sum() <= 3
