"""The model, the ranks and their groups, as a run of `hbp profile` finds them: built once, like a training run's."""

import contextlib
import gc
import io
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_hbp import __version__
from megatron_hbp.errors import ConfigError
from megatron_hbp.families import model_of_args
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model.extension import drop_stale_lock
from megatron_hbp.model.loss import CHUNK_ROWS
from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture
from megatron_hbp.model.spec import why_no_latents, with_packed_model
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Recompute
from megatron_hbp.planning.cost.profile_table import ProfileHeader
from megatron_hbp.profiling.options import ProfileOptions, add_arguments, config_digest, implied_flags
from megatron_hbp.profiling.packs import SyntheticStore
from megatron_hbp.profiling.yardstick import Yardstick
from megatron_hbp.runtime.arguments import MegatronRefusal, parse, refused_by_megatron
from megatron_hbp.runtime.refusals import PACKED, PROFILED
from megatron_hbp.training.feed import Feed
from megatron_hbp.training.forward import make_forward_step
from megatron_hbp.training.hooks import pipeline_arguments
from megatron_hbp.training.options import check_layout, feed_unit, without_fused_mla_rotary
from megatron_hbp.training.settle import machine_of, settle_tiers


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What every row is run with."""

    args: Any
    options: ProfileOptions
    model: list[Any]
    optimizer: Any
    """Held for its memory."""
    switch: RecomputeSwitch
    groups: CpGroups
    control: dist.ProcessGroup
    """gloo, all ranks: where they agree, whatever else they run on."""
    device: torch.device
    policies: tuple[Recompute, ...]
    header: ProfileHeader
    memory_limit: float | None
    """Bytes, the least of all ranks."""
    yardstick: Yardstick | None
    """None on CUDA."""

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return parallel_state.get_data_parallel_world_size()

    @property
    def on_cuda(self) -> bool:
        """Whether a device is timed, or this process."""
        return self.device.type == "cuda"

    def feed(self, plan: Plan) -> Feed:
        """Synthetic tokens for this rank's part of `plan`, again and again."""
        lengths = torch.zeros(plan.data.num_samples, dtype=torch.int64).numpy()
        lengths[plan.sample_ids] = plan.lengths
        tiers, _ = settle_tiers(
            plan, self.header.model.attention.on_tensor_parallel_rank(self.args.tensor_model_parallel_size),
            machine_of(self.args), exchange=self.header.exchange, kernel=self.args.hbp_kernel,
            no_latents=why_no_latents(get_model_config(self.model[0])),
        )  # fmt: skip
        store: Any = SyntheticStore(
            lengths=lengths, vocabulary=self.args.vocab_size, supervised=self.options.supervised
        )
        return Feed(
            plan=plan, store=store, groups=self.groups, rank=parallel_state.get_data_parallel_rank(),
            unit=feed_unit(self.args), full_length=False,
            device=self.device, tiers=tiers, joint_recompute=self.args.expert_model_parallel_size > 1, cyclic=True,
        )  # fmt: skip

    def clear_gradients(self) -> None:
        """As before every step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()

    def forward_backward(self, feed: Feed, step: int = 0, forward_step: Any = None) -> None:
        """All micro-batches of one step of the feed's plan, through Megatron-LM's own schedule; no optimizer step."""
        schedule = get_forward_backward_func()
        with micro_batch_context.on_bind(self.switch):
            schedule(
                forward_step_func=forward_step or make_forward_step(), data_iterator=feed, model=self.model,
                num_microbatches=len(feed.slots(step)), seq_length=self.args.seq_length, micro_batch_size=1,
                forward_only=False, **pipeline_arguments(self.model, feed, step),
            )  # fmt: skip


def build(argv: list[str], options: ProfileOptions) -> Session:
    """Parse Megatron-LM's arguments and build model, optimizer and groups. Collective over the world.

    Raises:
        ConfigError: flags that contradict each other, before any process group exists.
    """
    with _quiet():
        args = parse(
            argv, implied=implied_flags(options), add_arguments=add_arguments, subject="`hbp profile`",
            tables=(PACKED, PROFILED),
        )  # fmt: skip
    check_layout(args)
    if args.vocab_size is None:
        raise ConfigError("--vocab-size is missing: give that of your tokenizer")
    policies = options.policies(args.num_layers)
    degrees = options.degrees(args.data_parallel_size)
    modules = sorted({name for policy in policies for name in policy.modules})
    if modules:
        args.recompute_granularity, args.recompute_modules = "selective", modules
    # What is timed is one micro-batch; gradients are reduced once a step, and planned apart.
    args.overlap_grad_reduce = args.overlap_param_gather = False
    without_fused_mla_rotary(args)
    try:
        model = gpt_config_from_args(args)
    except MegatronRefusal as error:
        raise refused_by_megatron(error, "this model") from error
    args.variable_seq_lengths = model.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    install_context_capture()
    drop_stale_lock(modules)
    switch, packed = RecomputeSwitch(), with_packed_model(model)
    named = {f"--hbp-profile-recompute {policy}": policy for policy in policies}
    packed.pre_wrap_hooks.append(partial(switch.take, policies=named))
    with _quiet():
        training.initialize_megatron()
        chunks, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, packed),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    for chunk in chunks:
        chunk.train()
    get_model_config(chunks[0]).finalize_model_grads_func = None
    optimizer.zero_grad()
    optimizer.step()  # Adam's moments exist from the first step on: they must be in what memory is left
    device = torch.device(torch.cuda.current_device())
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    groups = CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timeout).warm_up(device)
    control = dist.new_group(backend="gloo", timeout=timeout)
    limit = options.memory
    if device.type == "cuda":
        total = torch.tensor(float(torch.cuda.mem_get_info(device)[1]))
        dist.all_reduce(total, op=dist.ReduceOp.MIN, group=control)
        limit = min(limit or float("inf"), float(total))
    # Half a million objects of libraries live as long as this process: looking through them takes 0.2 s a collection,
    # which every row ends with, and which would fall into a timed micro-batch now and then.
    gc.collect()
    gc.freeze()
    return Session(
        args=args, options=options, model=chunks, optimizer=optimizer, groups=groups, control=control, device=device,
        switch=switch, header=_header(args, model.transformer, options, device, degrees), policies=policies,
        memory_limit=limit, yardstick=None if device.type == "cuda" else Yardstick(),
    )  # fmt: skip


def _header(
    args: Any, config: Any, options: ProfileOptions, device: torch.device, degrees: tuple[int, ...]
) -> ProfileHeader:
    tp = args.tensor_model_parallel_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    model = model_of_args(args)
    on_one = model.attention.on_tensor_parallel_rank(tp)
    return ProfileHeader(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        # not megatron.core.__version__: it ends with the commit of whatever repository one stands in
        versions={"torch": torch.__version__, "megatron-core": version("megatron-core"), "megatron_hbp": __version__},
        model=model,
        flags=config_digest(config, args),
        layout={
            "world": args.world_size, "data_parallel": args.data_parallel_size, "tensor_parallel": tp,
            "pipeline_parallel": args.pipeline_model_parallel_size,
            "expert_parallel": args.expert_model_parallel_size, "node_size": max(1, local // tp),
        },
        dtype=str(args.params_dtype).removeprefix("torch."),
        # the first that all degrees allow, as cost models price an exchange that a plan leaves open
        exchange=args.hbp_exchange
        or next(each.name for each in EXCHANGES.values() if not any(each.refusal(on_one, c) for c in degrees)),
        supervised=options.supervised,
        logits_bytes=3.0 * 4 * args.padded_vocab_size / tp,  # three times fp32
        logits_rows=CHUNK_ROWS,
        memory="reserved and outside the allocator" if device.type == "cuda" else "allocated above the states",
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Megatron-LM's hundreds of lines of arguments off the terminal; argparse's own errors go through."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
