"""Runs on 4 gloo ranks: the context-parallel groups of several layouts, and what a step does to their number."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402

from megatron_hbp.errors import ConfigError  # noqa: E402
from megatron_hbp.parallel.groups import CpGroups  # noqa: E402
from megatron_hbp.planning.core.tiers import Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore  # noqa: E402
from tests.equivalence.support.stepping import Stepper  # noqa: E402

TIMEOUT = timedelta(seconds=97)


def main(result_path: str) -> None:
    """Every rank's findings, by rank."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    mine: dict[str, Any] = {}
    for name, (tp, pp) in {"dp4": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}.items():
        parallel_state.initialize_model_parallel(tp, pp)
        mine[name] = groups_of_layout()
        if name == "dp4":
            mine["steps"] = groups_made_by_steps()
        parallel_state.destroy_model_parallel()
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, mine)
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(every))
    dist.destroy_process_group()


def groups_of_layout() -> dict[str, Any]:
    """Members, sharing, timeouts and refusals inside the data-parallel groups of the current layout."""
    dp_group = parallel_state.get_data_parallel_group()
    size = dist.get_world_size(dp_group)
    made: list[list[int]] = []

    def new_group(ranks: list[int], **options: Any) -> Any:
        made.append(ranks)
        return NEW(ranks, **options)

    with mock.patch.object(dist, "new_group", side_effect=new_group):
        groups = CpGroups.create([4, 1, 2, 2] if size == 4 else [2, 1], dp_group, TIMEOUT)
    total = {}
    for degree, group in groups.by_degree.items():
        value = torch.tensor(2.0 ** dist.get_rank())
        dist.all_reduce(value, group=group)
        total[degree] = value.item()
    refused = {}
    for degree in (3, 8):
        try:
            CpGroups.create([1, degree], dp_group, TIMEOUT)
        except ConfigError as error:
            refused[degree] = str(error)
    return {
        "rank": dist.get_rank(),
        "data_parallel": dist.get_process_group_ranks(dp_group),
        "members": {degree: dist.get_process_group_ranks(group) for degree, group in groups.by_degree.items()},
        "sums": total,
        "shared": {degree: group is dp_group for degree, group in groups.by_degree.items()},
        "timeouts": {degree: timeout_of(group) for degree, group in groups.by_degree.items() if group is not dp_group},
        "degree 1": groups.group(1),
        "num_created": groups.num_created,
        "calls": made,
        "refused": refused,
    }


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the backend of a group waits, read back from the group itself."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def groups_made_by_steps() -> dict[str, int]:
    """How many groups ten steps of mixed degrees make, in torch and in Megatron-LM."""
    store = MemoryStore.random([30, 20, 10, 25, 5, 1, 33], vocabulary=VOCABULARY)
    stepper = Stepper(build("moe"), store, (1, 2, 4))
    tiers = [Tier(packing_length=64 * c, cp_degree=c) for c in (1, 2, 4)]
    packs = [(0, 0, 0, 2, [0, 1]), (0, 1, 0, 1, [2, 3]), (0, 1, 2, 0, [4, 5]), (0, 1, 3, 0, [6])]
    known = len(dist.distributed_c10d._world.pg_map)
    with mock.patch.object(dist, "new_group", side_effect=NEW) as new_group:
        for _ in range(10):
            stepper.gradients(packs, tiers)
    return {"calls": new_group.call_count, "known": len(dist.distributed_c10d._world.pg_map) - known}


NEW = dist.new_group

if __name__ == "__main__":
    main(sys.argv[-1])
