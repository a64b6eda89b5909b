"""Megatron-LM's data-set provider: the feeds of a rank, and before them the groups they run on."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from megatron_hbp.model import kernels
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.training.agreement import check_agreement
from megatron_hbp.training.feed import Feed
from megatron_hbp.training.options import HbpOptions
from megatron_hbp.training.settle import attention_shape, machine_of, settle_tiers

Provider = Callable[..., tuple[Feed, Feed | None, None]]


def feeds_provider(options: HbpOptions) -> Provider:
    """One feed for training and one for evaluation on every rank."""
    groups: list[CpGroups] = []

    def provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Feed, Feed | None, None]:
        args = get_args()
        data = [part for part in (options.train, options.valid) if part is not None]
        if not groups:  # called once a virtual pipeline stage; the groups are made once
            groups.append(_make_groups({tier.cp_degree for part in data for tier in part.plan.tiers}))
        device = torch.device(torch.cuda.current_device())
        feeds: list[Feed | None] = []
        for part in data:
            tiers, lines = settle_tiers(
                part.plan,
                attention_shape(args),
                machine_of(args),
                exchange=args.hbp_exchange,
                kernel=args.hbp_kernel,
            )
            for tier in tiers:
                kernels.choose(tier.kernel, device, args.params_dtype)
            if part is options.train and not vp_stage:
                _say(*lines)
            feeds.append(
                Feed(
                    plan=part.plan,
                    store=part.store,
                    groups=groups[0],
                    rank=parallel_state.get_data_parallel_rank(),
                    unit=args.tensor_model_parallel_size if args.sequence_parallel else 1,
                    full_length=args.pipeline_model_parallel_size > 1 and not args.variable_seq_lengths,
                    device=device,
                    tiers=tiers,
                    joint_recompute=args.expert_model_parallel_size > 1,
                    first_step=0 if part is options.valid else args.iteration,
                    cyclic=part is options.valid,
                )
            )
        train, valid = [*feeds, None][:2]
        assert train is not None
        if not vp_stage:
            check_agreement(train, train.tiers, parallel_state.get_data_parallel_group())
        return train, valid, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def _make_groups(degrees: set[int]) -> CpGroups:
    timeout = timedelta(minutes=get_args().distributed_timeout_minutes)
    groups = CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timeout)
    groups = groups.warm_up(torch.device(torch.cuda.current_device()))
    _say(groups.describe(int(os.environ.get("LOCAL_WORLD_SIZE", "8"))))
    return groups


def _say(*lines: str) -> None:
    if torch.distributed.get_rank() == 0:
        for line in lines:
            print(f"> hbp: {line}", flush=True)
