"""Plans as rows."""

import json

import numpy as np
import pytest

from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.rows import plan_rows
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.slices import local_ranks
from megatron_hbp.planning.request import Request
from tests.unit.planning.core.test_slices import as_the_run_time_splits


def plan_of(lengths, tiers):
    return make_plan(Samples.of(lengths), Request(tiers=parse_tiers(tiers), num_ranks=4, step_tokens=8192))


def test_rows_are_complete_and_plain_json():
    lengths = np.array([100, 900, 3000, 50, 60, 70, 2000])
    rows = [json.loads(json.dumps(row)) for row in plan_rows(plan_of(lengths, "1024:cp1:full3,4096:cp4"))]
    assert sorted(sample for row in rows for sample in row["samples"]) == list(range(7))
    for row in rows:
        assert row["lengths"] == lengths[row["samples"]].tolist()
        assert row["offsets"] == [sum(row["lengths"][:i]) for i in range(len(row["lengths"]))]
        assert len(row["ranks"]) == row["cp_degree"] and sum(row["lengths"]) <= row["capacity"]
        shared = row["cp_degree"] > 1
        assert (row["cp_local_rank"] is not None) == shared
        assert row["recompute"] == (None if shared else {"granularity": "full", "layers": 3, "modules": []})


def test_short_samples_in_shared_packs_lie_behind_the_long_ones():
    plan = plan_of(np.concatenate([[3000, 2500, 3500], np.full(30, 20)]), "64:cp1,4096:cp4")
    for index in np.flatnonzero(plan.pack_cp > 1):
        pack = plan.pack(index)
        assert (np.diff(pack.lengths) <= 0).all()
        local = local_ranks(pack, plan.tiers[pack.tier])
        assert (local[pack.lengths == 20] == -1).sum() <= 3


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_local_ranks_of_a_plan_are_those_of_the_run_time(layout):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 60, 400), rng.integers(65, 2049, 60)])
    plan = plan_of(lengths, f"64:cp1,512:cp2:{layout},2048:cp4:{layout}")
    differences = shared = 0
    for index, row in enumerate(plan_rows(plan)):
        if row["cp_local_rank"] is None:
            continue
        shared += 1
        pack = plan.pack(index)
        expected = as_the_run_time_splits(pack, plan.tiers[pack.tier]).tolist()
        differences += row["cp_local_rank"] != [None if rank < 0 else rank for rank in expected]
    assert shared > 20 and differences == 0
