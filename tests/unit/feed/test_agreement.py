"""Orders of shared packs: what the plan says, what a feed does, and orders in which a gang never meets."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_hbp.errors import PlanError
from megatron_hbp.feed.agreement import check_meetings, order_of, planned_orders
from megatron_hbp.feed.feed import Feed
from megatron_hbp.planning.core.tiers import Tier
from tests.equivalence.support.plans import plan_of

TIERS = [Tier(packing_length=16), Tier(packing_length=32, cp_degree=2), Tier(packing_length=64, cp_degree=4)]
LENGTHS = np.full(8, 10)
# ranks 0 and 1 share two packs, 2 and 3 one, all of them another; rank 3 has one of its own between
PACKS = [
    (0, 0, 0, 1, [0]), (0, 0, 2, 1, [1]), (0, 1, 0, 1, [2]), (0, 1, 3, 0, [3]), (0, 2, 0, 2, [4]), (1, 0, 1, 0, [5]),
]  # fmt: skip


@pytest.fixture(params=["lockstep", "gang"])
def plan(request):
    made = plan_of(PACKS, tiers=TIERS, lengths=LENGTHS, num_ranks=4)
    return dataclasses.replace(made, schedule=request.param)


def feed_of(plan, rank):
    unused: Any = None
    return Feed(plan=plan, store=unused, groups=unused, rank=rank, unit=1, full_length=False, device=unused)


def test_every_feed_walks_as_planned(plan):
    planned = planned_orders(plan)
    assert [order.tolist() for order in planned] == [[0, 2, 4], [0, 2, 4], [1, 4], [1, 4]]
    assert [order_of(feed_of(plan, rank)).tolist() for rank in range(4)] == [order.tolist() for order in planned]
    check_meetings(plan, planned)


def test_slots_of_a_gang_schedule_hold_packs_or_one_dummy(plan):
    slots = [feed_of(plan, rank).slots(0) for rank in range(4)], [feed_of(plan, rank).slots(1) for rank in range(4)]
    if plan.schedule == "lockstep":
        assert slots == ([[0, 1, 2]] * 4, [[0]] * 4)
    else:
        assert slots == ([[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]], [[0]] * 4)


@pytest.mark.parametrize(
    "rank, order, message",
    [
        (1, [2, 0, 4], "rank 0 would wait for ever in step 0: it shares pack 0 with ranks 0 to 1, and rank 1 comes"),
        (2, [4, 1], "rank 0 would wait for ever in step 0: it shares pack 4 with ranks 0 to 3, and rank 3 comes"),
        (3, [4], "rank 0 would wait for ever in step 0: it shares pack 4 with ranks 0 to 3, and rank 2 comes"),
        (0, [0, 2], "rank 1 would wait for ever in step 0: it shares pack 4"),
    ],
)
def test_an_order_in_which_a_gang_never_meets_is_refused(plan, rank, order, message):
    orders = planned_orders(plan)
    orders[rank] = np.array(order)
    with pytest.raises(PlanError) as refused:
        check_meetings(plan, orders)
    assert message in str(refused.value) and "make the plan again" in str(refused.value)


def test_a_plan_whose_packs_are_out_of_order_is_refused_when_it_is_read(plan):
    turned = {
        name: getattr(plan, name)[[1, 0, 2, 3, 4, 5]]
        for name in ("pack_tier", "pack_step", "pack_slot", "pack_rank0", "sample_ids", "lengths")
    }
    with pytest.raises(PlanError, match="packs not in the order of steps, slots and ranks"):
        dataclasses.replace(plan, **turned).check()
