"""Megatron-LM's data-set provider: the feeds of a rank, and before them the groups they run on."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.training.agreement import check_orders, check_same_plans
from megatron_hbp.training.feed import Feed
from megatron_hbp.training.options import HbpOptions, feed_unit

Provider = Callable[..., tuple[Feed, Feed | None, None]]


def feeds_provider(options: HbpOptions, tiers: Sequence[Sequence[Tier]]) -> Provider:
    """One feed for training and one for evaluation on every rank; `tiers` of each, with their exchanges."""
    groups: list[CpGroups] = []

    def provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Feed, Feed | None, None]:
        args = get_args()
        data = [part for part in (options.train, options.valid) if part is not None]
        if not groups:  # called once a virtual pipeline stage; the groups are made once
            check_same_plans([part.plan for part in data], tiers)
            groups.append(_make_groups({tier.cp_degree for part in data for tier in part.plan.tiers}))
        node_ranks = _ranks_of_node() if not vp_stage else []
        device = torch.device(torch.cuda.current_device())
        feeds: list[Feed] = []
        for part, settled in zip(data, tiers, strict=True):
            feeds.append(
                Feed(
                    plan=part.plan,
                    store=part.store,
                    groups=groups[0],
                    rank=parallel_state.get_data_parallel_rank(),
                    unit=feed_unit(args),
                    full_length=args.pipeline_model_parallel_size > 1 and not args.variable_seq_lengths,
                    device=device,
                    tiers=settled,
                    joint_recompute=args.expert_model_parallel_size > 1,
                    first_step=0 if part is options.valid else args.iteration,
                    cyclic=part is options.valid,
                    read_ahead=args.hbp_read_ahead,
                    node_ranks=node_ranks,
                )
            )
        if not vp_stage:
            for feed in feeds:
                check_orders(feed, parallel_state.get_data_parallel_group())
        return feeds[0], feeds[1] if options.valid is not None else None, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def _make_groups(degrees: set[int]) -> CpGroups:
    timeout = timedelta(minutes=get_args().distributed_timeout_minutes)
    groups = CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timeout)
    groups = groups.warm_up(torch.device(torch.cuda.current_device()))
    _say(groups.describe(int(os.environ.get("LOCAL_WORLD_SIZE", "8"))))
    return groups


def _ranks_of_node() -> list[int]:
    """On the first process of a node the data-parallel ranks that the node holds, on the others none. Collective."""
    here = os.environ.get("GROUP_RANK", "0")  # torchrun's number of the node
    every: list[tuple[str, int]] = [(here, 0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (here, parallel_state.get_data_parallel_rank()))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    return sorted({rank for node, rank in every if node == here}) if is_first else []


def _say(*lines: str) -> None:
    if torch.distributed.get_rank() == 0:
        for line in lines:
            print(f"> hbp: {line}", flush=True)
