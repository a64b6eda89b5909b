"""A run on packs, set up once: what training, profiling and other programs share between their flags and their model.

    argv --HbpOptions, parse--> args --set_up--> Runtime --> model config, CP groups, resolved tiers, feeds, steps

To be imported after `parse`, which applies the platform layer: Megatron-LM is imported here.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig

from megatron_hbp.errors import ConfigError
from megatron_hbp.families import model_of_args
from megatron_hbp.feed.feed import Feed
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model import kernels
from megatron_hbp.model.extension import drop_stale_lock
from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture
from megatron_hbp.model.spec import why_no_latents, with_packed_model
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.parallel.pipeline_shapes import PlannedP2PCommunicator
from megatron_hbp.planning.core.exchanges import AUTO, EXCHANGES, usable
from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Kernel, Recompute, Tier
from megatron_hbp.planning.cost.exchange import choose_exchange
from megatron_hbp.runtime.checks import check_layout, feed_unit
from megatron_hbp.runtime.options import HbpOptions
from megatron_hbp.runtime.program import MegatronRefusal, refused_by_megatron


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """What a program on packs has when its flags are read; groups and feeds need Megatron-LM's process groups."""

    args: Any
    """Megatron-LM's arguments."""
    options: HbpOptions
    model: GPTModelConfig
    """With packed layers; recompute policies are checked when the model is built from it."""
    switch: RecomputeSwitch
    """Sets the policy of a micro-batch on that model."""
    notes: tuple[str, ...]
    """Lines for the log."""

    @property
    def device(self) -> torch.device:
        """That of this rank."""
        return torch.device(torch.cuda.current_device())

    def resolve(self, plan: Plan) -> tuple[tuple[Tier, ...], list[str]]:
        """The plan's tiers with their exchanges, and lines for the log.

        Raises:
            ConfigError: a named exchange or kernel cannot be used.
        """
        tp = self.args.tensor_model_parallel_size
        machine = replace(self.options.machine, node_size=ranks_of_node(tp))
        tiers, lines = resolve_tiers(
            plan,
            model_of_args(self.args).attention.on_tensor_parallel_rank(tp),
            machine if self.device.type == "cuda" else None,
            exchange=self.options.exchange,
            kernel=self.options.kernel,
            no_latents=why_no_latents(self.model.transformer),
        )
        for tier in tiers:
            kernels.select(tier.kernel, self.device, self.args.params_dtype)
        return tiers, lines

    def make_groups(self, degrees: Iterable[int]) -> CpGroups:
        """The CP groups of `degrees`, ready for use. Collective over the world."""
        timeout = timedelta(minutes=self.args.distributed_timeout_minutes)
        return CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timeout).warm_up(self.device)

    def feed(self, plan: Plan, store: Any, tiers: Sequence[Tier], groups: CpGroups, **how: Any) -> Feed:
        """This rank's feed of a plan; `how` are further arguments of Feed."""
        args = self.args
        return Feed(
            plan=plan, store=store, tiers=tiers, groups=groups, rank=parallel_state.get_data_parallel_rank(),
            unit=feed_unit(args), device=self.device, joint_recompute=args.expert_model_parallel_size > 1,
            full_length=args.pipeline_model_parallel_size > 1 and not args.variable_seq_lengths, **how,
        )  # fmt: skip

    def run_step(self, schedule: Callable, model: list[Any], feed: Feed, step: int, **rest: Any) -> Any:
        """One pass of a schedule of Megatron-LM over all micro-batches of one step of the feed's plan."""
        rest |= {"num_microbatches": len(feed.slots(step)), **pipeline_arguments(model, feed, step)}
        with micro_batch_context.on_bind(self.switch):
            return schedule(model=model, **rest)


def set_up(args: Any, options: HbpOptions, *, policies: Mapping[str, Recompute], shapes_vary: bool) -> Runtime:
    """Make a model config that works on packs out of Megatron-LM's arguments, which are adapted to it.

    Args:
        args: Megatron-LM's arguments.
        options: ours.
        policies: every recompute policy of the run, by what a message is to call it.
        shapes_vary: whether pipeline stages exchange tensors of several shapes.

    Raises:
        ConfigError: a model or layout that Megatron-LM refuses.
    """
    check_layout(args)
    torch.cuda.set_device(
        args.local_rank
    )  # Megatron-LM does it later: until then all ranks of a node would ask device 0
    # FP8 layers decide at construction what they save for the backward, and Megatron-LM checks modules against the
    # model where the config is made: it is built for all modules, and each micro-batch uses its own policy's
    modules = sorted({name for policy in policies.values() for name in policy.modules})
    if modules:
        args.recompute_granularity, args.recompute_modules = "selective", modules
    notes = []
    if args.multi_latent_attention and args.apply_rope_fusion:  # the default on CUDA; there is no flag to ask for it
        args.apply_rope_fusion = False
        notes.append("rope fusion is off: Megatron-LM's kernel for latent attention knows no positions inside a pack")
    model = with_packed_model(model_config(args))
    # not before the config is made: it would refuse Megatron-LM's default dispatcher, of a dense model too
    args.variable_seq_lengths = model.transformer.variable_seq_lengths = shapes_vary
    switch = RecomputeSwitch()
    model.pre_wrap_hooks.append(partial(switch.take, policies=policies))
    install_context_capture()
    drop_stale_lock(modules)
    return Runtime(args=args, options=options, model=model, switch=switch, notes=tuple(notes))


def model_config(args: Any) -> GPTModelConfig:
    """Megatron-LM's model config. Raises ConfigError where it refuses the arguments."""
    try:
        return gpt_config_from_args(args)
    except MegatronRefusal as error:
        raise refused_by_megatron(error, "this model") from error


def resolve_tiers(
    plan: Plan, shape: AttentionShape, machine: Machine | None, *, exchange: str | None, kernel: Kernel | None,
    no_latents: str | None = None,
) -> tuple[tuple[Tier, ...], list[str]]:  # fmt: skip
    """The plan's tiers without an `auto` exchange, and a line for the log for each tier that exchanges.

    Args:
        plan: the schedule; its packs say how long the samples of a tier are.
        shape: attention on one tensor-parallel rank.
        machine: what exchanges are priced with; None without CUDA, where prices of GPUs would mislead: the first that
            can be used is taken (the ring's plain-torch blocks made the demo's MLA model three times as slow).
        exchange: overrides that of all tiers.
        kernel: overrides that of all tiers.
        no_latents: why the model cannot exchange latents, and what to do; None where it can.

    Raises:
        ConfigError: a named exchange cannot be used with this model and degree.
    """
    if no_latents:
        shape = replace(shape, kv_latent=0)
    tiers, lines = [], []
    for index, tier in enumerate(plan.tiers):
        tier = replace(tier, exchange=exchange or tier.exchange, kernel=kernel or tier.kernel)
        if tier.cp_degree == 1:
            tiers.append(replace(tier, exchange="a2a", layout=AUTO))
            continue
        if tier.exchange == AUTO and machine is None:
            tier = replace(tier, exchange=usable(shape, tier.cp_degree)[0].name)
            reason = f"{tier.exchange} (no CUDA device to price others for)"
        elif tier.exchange == AUTO:
            assert machine is not None
            chosen, reason = _cheapest(tier, plan.pack_squares[plan.pack_tier == index], shape, machine)
            tier = replace(tier, exchange=chosen)
        elif why := EXCHANGES[tier.exchange].refusal(shape, tier.cp_degree):
            if EXCHANGES[tier.exchange].needs_latents and no_latents:
                why = no_latents
            raise ConfigError(
                f"tier {tier}: exchange {tier.exchange} cannot be used: {why}; or leave the exchange out, or give "
                f"--hbp-exchange with one of {', '.join(each.name for each in usable(shape, tier.cp_degree))}"
            )
        else:
            reason = f"{tier.exchange} (as asked for)"
        tiers.append(tier)
        lines.append(f"tier {plan.tiers[index]}: exchange {reason}")
    return tuple(tiers), lines


def _cheapest(tier: Tier, squares: np.ndarray, shape: AttentionShape, machine: Machine) -> tuple[str, str]:
    """Name and reason; a pack of the tier is full and has the median of its packs' summed squares."""
    choice = choose_exchange(
        shape,
        cp_degree=tier.cp_degree,
        tokens=tier.packing_length,
        squares=float(np.median(squares)) if len(squares) else float(tier.packing_length),
        machine=machine,
        zigzag=tier.layout == "contiguous" or tier.packing_length % (2 * tier.cp_degree * tier.alignment) == 0,
    )
    if not choice.prices:
        raise ConfigError(
            f"tier {tier}: no exchange can be used: heads do not divide by its CP degree, and its packing length does "
            f"not by {2 * tier.cp_degree * tier.alignment} (mirrored slices); choose another packing length"
        )
    return choice.exchange, choice.reason


def pipeline_arguments(model: list[Any], feed: Feed, step: int) -> dict[str, Any]:
    """Arguments that let a schedule take shapes from the plan; none where stages exchange fixed ones, or nothing.

    Args:
        model: its chunks.
        feed: that of the plan whose step is run.
        step: the step of that plan.
    """
    config = get_model_config(model[0])
    if config.pipeline_model_parallel_size == 1 or not config.variable_seq_lengths:
        return {}
    lengths = [feed.local_tokens(step, slot) for slot in feed.slots(step)]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {"p2p_communicator": PlannedP2PCommunicator(groups.pp, config, lengths), "pg_collection": groups}


def ranks_of_node(tp: int = 1) -> int:
    """Data-parallel ranks that a node holds, of `tp` processes each."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "8")) // tp)


def say(*lines: str) -> None:
    """Print lines on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(*(f"> hbp: {line}" for line in lines), sep="\n", flush=True)
