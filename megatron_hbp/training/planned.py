"""Train on a plan: a runtime, hooked into Megatron-LM's `pretrain()`."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hbp.feed.agreement import check_orders, check_same_plans
from megatron_hbp.feed.feed import Feed
from megatron_hbp.feed.forward import make_forward_step
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.runtime.checks import check_plans, shapes_vary
from megatron_hbp.runtime.options import HbpOptions, PlannedData
from megatron_hbp.runtime.record import write_record
from megatron_hbp.runtime.setup import Runtime, ranks_of_node, say, set_up
from megatron_hbp.training import hooks
from megatron_hbp.training.metrics import RunMetrics
from megatron_hbp.training.plain import train


def train_on_plan(args: Any, options: HbpOptions) -> None:
    """Train to the end of the plan, or of --train-iters.

    Args:
        args: Megatron-LM's arguments.
        options: ours.

    Raises:
        HbpError: plan, model, layout and flags do not go together, or training diverged.
    """
    assert options.train is not None
    check_plans(args, options)
    policies = {f"tier {tier}": tier.recompute for tier in options.tiers}
    runtime = set_up(args, options, policies=policies, shapes_vary=shapes_vary(args, options))
    resolved = [runtime.resolve(part.plan) for part in options.data]
    plan, tiers = options.train.plan, [each for each, _ in resolved]
    facts = {"plan": plan.hash, "tiers": [str(t) for t in plan.tiers], "ranks": plan.num_ranks, "steps": plan.num_steps}
    say(json.dumps(facts), *runtime.notes, *resolved[0][1])
    args.hbp_plan_hash = plan.hash  # Megatron-LM saves its arguments in checkpoints
    write_record(runtime, tiers)
    metrics = RunMetrics(plan, options.metrics)
    hooks.install(runtime, metrics)
    train(args, runtime.model, feeds_provider(runtime, tiers), make_forward_step(metrics.observe))
    metrics.summarise(parallel_state.get_data_parallel_group())


def feeds_provider(runtime: Runtime, tiers: Sequence[Sequence[Tier]]) -> Callable[..., tuple[Feed, Feed | None, None]]:
    """Megatron-LM's data-set provider: on every rank a feed for training, and one for evaluation.

    Args:
        runtime: the run.
        tiers: those of each plan, with their exchanges.
    """
    options = runtime.options

    @functools.cache
    def groups() -> CpGroups:  # made once; the provider is called for each virtual pipeline stage
        check_same_plans([part.plan for part in options.data], tiers)
        made = runtime.make_groups({tier.cp_degree for tier in options.tiers})
        say(made.describe(ranks_of_node()))
        return made

    def feed_of(part: PlannedData, resolved: Sequence[Tier], node_ranks: list[int]) -> Feed:
        is_valid = part is options.valid
        return runtime.feed(
            part.plan, part.store, resolved, groups(), cyclic=is_valid, node_ranks=node_ranks,
            first_step=0 if is_valid else runtime.args.iteration, read_ahead=options.read_ahead,
        )  # fmt: skip

    def provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Feed, Feed | None, None]:
        node_ranks = [] if vp_stage else _ranks_of_node()
        feeds = [feed_of(*each, node_ranks) for each in zip(options.data, tiers, strict=True)]
        for feed in feeds if not vp_stage else ():
            check_orders(feed, parallel_state.get_data_parallel_group())
        return feeds[0], feeds[1] if options.valid is not None else None, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def _ranks_of_node() -> list[int]:
    """On the first process of a node the data-parallel ranks that the node holds, on the others none. Collective."""
    here = os.environ.get("GROUP_RANK", "0")  # torchrun's number of the node
    every: list[tuple[str, int]] = [(here, 0)] * dist.get_world_size()
    dist.all_gather_object(every, (here, parallel_state.get_data_parallel_rank()))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    return sorted({rank for node, rank in every if node == here}) if is_first else []
