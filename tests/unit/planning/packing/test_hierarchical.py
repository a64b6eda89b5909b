"""From samples to packs of several tiers."""

from typing import Any

import numpy as np

from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.packing.hierarchical import group_data, spread, whole_slots
from tests.unit.planning.plans import plan_of

TIERS = "1024:cp1,8192:cp4"


def test_a_boundary_belongs_to_the_lower_tier():
    lengths = np.array([1, 1023, 1024, 1025, 8191, 8192, 8193])
    assert group_data(lengths, parse_tiers(TIERS)).tolist() == [0, 0, 0, 1, 1, 1, 2]
    options: dict[str, Any] = {"num_ranks": 4, "step_tokens": 16384}
    assert plan_of([1024] * 4, TIERS, **options).pack_cp.tolist() == [1] * 4
    assert plan_of([1025], TIERS, **options).pack_cp.tolist() == [4]


def test_data_distributed_in_parts_is_whole(monkeypatch):
    monkeypatch.setattr("megatron_hbp.planning.packing.hierarchical._PART_SAMPLES", 1000)
    monkeypatch.setattr("megatron_hbp.planning.packing.hierarchical._CLOSEST_FIT_SAMPLES", 20)
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 400, 7500), rng.integers(1025, 8192, 70)])
    plan = plan_of(lengths, TIERS, num_ranks=4, step_tokens=16384)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))
    assert plan_metrics(plan, preset("llama3.1-8b-h100")).pr < 0.02


def test_slots_are_whole_and_what_is_left_shares_one():
    assert whole_slots(16.0, 0, 1, 8) == (16, 8)  # few slots: the last is spread over all ranks, it ends soonest
    assert whole_slots(20.0, 4, 1, 8) == (20, 8)
    assert whole_slots(1600.0, 0, 1, 8) == (1600, 3)  # many: padding and idle ranks share what a slot wastes
    assert whole_slots(1606.0, 0, 1, 8) == (1600, 8)  # three quarters of a slot are left
    assert whole_slots(800.0, 0, 2, 8) == (800, 1)  # gangs of two ranks


def test_what_is_left_is_spread_and_never_overflows():
    pack_of = spread(np.array([5, 9, 3, 3, 8]), 10, 2)
    assert np.bincount(pack_of, [5, 9, 3, 3, 8]).max() <= 10
    assert pack_of[1] == 0 and pack_of[4] == 1  # longest first, into the emptiest
