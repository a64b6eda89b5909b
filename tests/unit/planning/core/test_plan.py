"""Plans: columns that agree, built from packs in any order, and parts of them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_hbp.errors import PlanError
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.request import Request

LENGTHS = np.concatenate([np.random.default_rng(0).integers(1, 50, 56), [200, 130, 100, 256]])


@pytest.fixture
def plan():
    return make_plan(
        Samples.of(LENGTHS), Request(tiers=parse_tiers("64:cp1:full2,256:cp4"), num_ranks=4, step_tokens=512)
    )


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sample_ids", 60, "outside the data"),
        ("pack_tier", 2, "unknown tier"),
        ("pack_rank0", 99, "gang outside"),
        ("pack_slot", 99, "outside the slots"),
        ("lengths", 0, "below one token"),
    ],
)
def test_columns_that_contradict(plan, column, value, message):
    changed = getattr(plan, column).copy()
    changed[0] = value
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, **{column: changed}).check()


def test_two_packs_on_one_rank(plan):
    moved = np.zeros_like(plan.pack_rank0)
    with pytest.raises(PlanError, match="two packs on one rank"):
        dataclasses.replace(plan, pack_rank0=moved).check()


FIELDS: dict[str, Any] = {
    "num_ranks": 4, "schedule": "lockstep", "seed": 3, "step_tokens": 9, "cost": {},
    "data": DataFingerprint(num_samples=9, lengths_sha256="0"),
}  # fmt: skip


def test_packs_are_built_in_any_order_and_sorted_by_step_slot_and_rank():
    tiers = parse_tiers("8:cp1,24:cp2")
    built = Plan.build(
        tiers=tiers,
        sample_ids=np.array([8, 1, 5, 6, 0, 2]),
        lengths=np.array([3, 9, 4, 2, 11, 5]),
        pack_of=np.array([2, 0, 2, 1, 0, 3]),
        pack_tier=np.array([1, 0, 0, 0]),
        step=np.array([1, 0, 0, 0]),
        slot=np.array([0, 1, 0, 0]),
        rank0=np.array([2, 0, 3, 1]),
        counts={"dropped": 1},
        **FIELDS,
    )
    assert built.pack_step.tolist() == [0, 0, 0, 1]
    assert built.pack_slot.tolist() == [0, 0, 1, 0]
    assert built.pack_rank0.tolist() == [1, 3, 0, 2]
    assert [built.pack(index).sample_ids.tolist() for index in range(4)] == [[2], [8, 5], [6], [0, 1]]
    # in shared packs the longest come first
    assert [built.pack(index).lengths.tolist() for index in range(4)] == [[5], [3, 4], [2], [11, 9]]
    assert built.num_micro_batches.tolist() == [2, 1]
    assert built.counts == {"dropped": 1, "dummies": 3 * 4 - (3 + 2)}
    assert (built.num_ranks, built.seed, built.step_tokens) == (4, 3, 9)
    assert [built.pack_at(0, 0, rank) for rank in range(4)] == [-1, 0, -1, 1]


def test_steps_may_have_more_slots_than_packs_and_a_gang_plan_no_dummies():
    facts: dict[str, Any] = {
        "tiers": parse_tiers("8:cp1"), "sample_ids": np.array([0]), "lengths": np.array([3]), "pack_of": np.array([0]),
        "pack_tier": np.array([0]), "step": np.array([0]), "slot": np.array([0]), "rank0": np.array([0]),
        "num_micro_batches": np.array([4]),
    }  # fmt: skip
    assert Plan.build(**facts, **FIELDS).counts["dummies"] == 15
    gang = Plan.build(**facts, **FIELDS | {"schedule": "gang"})
    assert gang.counts["dummies"] == 0 and gang.num_micro_batches.tolist() == [4]


def test_a_part_of_a_plan_keeps_its_packs_and_what_describes_the_whole(plan):
    packs = np.flatnonzero(plan.pack_step > 0)[::-1]
    part = plan.subset(packs, step=plan.pack_step[packs] - 1, slot=plan.pack_slot[packs], rank0=plan.pack_rank0[packs])
    part.check()
    first = int(np.searchsorted(plan.pack_step, 1))
    assert part.sample_ids.tolist() == plan.sample_ids[plan.pack_offsets[first] :].tolist()
    assert part.lengths.tolist() == plan.lengths[plan.pack_offsets[first] :].tolist()
    assert part.num_micro_batches.tolist() == plan.num_micro_batches[1:].tolist()
    for name in ("tiers", "num_ranks", "schedule", "seed", "step_tokens", "cost", "data"):
        assert getattr(part, name) == getattr(plan, name), name


def test_what_decides_a_plan_decides_its_hash(plan):
    assert dataclasses.replace(plan).hash == plan.hash
    assert dataclasses.replace(plan, cost=dict(plan.cost) | {"step_seconds": 1.0}).hash != plan.hash
    assert dataclasses.replace(plan, seed=1).hash != plan.hash
