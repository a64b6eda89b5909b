"""Before the first step: do all ranks mean the same plan, and does nobody wait for a gang that never comes?

Mismatched collectives hang or return wrong sums in silence. What each rank will run follows from the plan, so it can be
compared beforehand: each rank's own way through its feed with what all others expect of it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_hbp.errors import PlanError
from megatron_hbp.feed.feed import Feed
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Tier


def order_of(feed: Feed) -> np.ndarray:
    """The packs that this rank shares with others, in the order in which its feed comes to them: int64."""
    plan = feed.plan
    ran = [plan.pack_at(step, slot, feed.rank) for step in range(plan.num_steps) for slot in feed.slots(step)]
    packs = np.array([index for index in ran if index >= 0], np.int64)
    return packs[plan.pack_cp[packs] > 1]


def planned_orders(plan: Plan) -> list[np.ndarray]:
    """The same for every rank, from the plan's columns: packs are stored in the order of steps and slots."""
    shared = np.flatnonzero(plan.pack_cp > 1)
    first, width = plan.pack_rank0[shared], plan.pack_cp[shared]
    return [shared[(first <= rank) & (rank < first + width)] for rank in range(plan.num_ranks)]


def check_meetings(plan: Plan, orders: Sequence[np.ndarray]) -> None:
    """Raise PlanError unless every gang meets: each shared pack is next on all its ranks at some time.

    Args:
        plan: the schedule.
        orders: shared packs in order, one array for each data-parallel rank.
    """
    todo = [order.tolist() for order in orders]
    at = [0] * len(todo)
    waiting: dict[int, int] = {}  # pack -> ranks that have come to it
    ready = list(range(len(todo)))
    while ready:
        rank = ready.pop()
        if at[rank] == len(todo[rank]):
            continue
        pack = todo[rank][at[rank]]
        waiting[pack] = waiting.get(pack, 0) + 1
        if waiting[pack] == plan.pack_cp[pack]:
            for member in _gang(plan, pack):
                at[member] += 1
                ready.append(member)
    stuck = next((rank for rank, order in enumerate(todo) if at[rank] < len(order)), None)
    if stuck is not None:
        pack = todo[stuck][at[stuck]]
        gang = _gang(plan, pack)
        other = next(r for r in gang if at[r] == len(todo[r]) or todo[r][at[r]] != pack)
        raise PlanError(
            f"data-parallel rank {stuck} would wait for ever in step {plan.pack_step[pack]}: it shares pack {pack} "
            f"with ranks {gang.start} to {gang.stop - 1}, and rank {other} comes to another pack first or never to "
            f"this one; make the plan again with `hbp plan`"
        )


def _gang(plan: Plan, pack: int) -> range:
    first = int(plan.pack_rank0[pack])
    return range(first, first + int(plan.pack_cp[pack]))


def check_same_plans(plans: Sequence[Plan], tiers: Sequence[Sequence[Tier]]) -> None:
    """Raise PlanError on every rank unless all have the same plans and tiers.

    Collective over the world, before any group of a gang is made: `new_group` with other members hangs.
    """
    mine = {
        "plan": "+".join(plan.hash for plan in plans),
        "tiers with their exchanges": _digest(";".join(",".join(map(str, each)) for each in tiers).encode()),
    }
    every: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for what in mine:
        other = next((rank for rank, found in enumerate(every) if found[what] != every[0][what]), None)
        if other is not None:
            raise PlanError(
                f"ranks disagree on the {what}: rank 0 has {every[0][what][:12]}, rank {other} has "
                f"{every[other][what][:12]}; give all ranks the same files and flags"
            )


def check_orders(feed: Feed, dp_group: dist.ProcessGroup) -> None:
    """Raise PlanError on every rank unless each walks its feed as the plan says and all gangs meet.

    Collective over `dp_group`, before the first micro-batch of the feed.
    """
    plan = feed.plan
    orders = planned_orders(plan)
    walked: list[str] = [""] * dist.get_world_size(dp_group)
    dist.all_gather_object(walked, _digest(order_of(feed).tobytes()), group=dp_group)
    for rank, (found, order) in enumerate(zip(walked, orders, strict=True)):
        if found != _digest(order.astype(np.int64).tobytes()):
            raise PlanError(
                f"data-parallel rank {rank} would come to its shared packs in another order than the plan has; "
                f"all ranks must run the same version of this program on the same plan"
            )
    check_meetings(plan, orders)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
