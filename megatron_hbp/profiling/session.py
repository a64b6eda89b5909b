"""The model, the ranks and their groups, as a run of `hbp profile` finds them: built once, like a training run's."""

import gc
import platform
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_hbp.errors import ConfigError
from megatron_hbp.families import model_of_args
from megatron_hbp.feed.feed import Feed
from megatron_hbp.feed.forward import make_forward_step
from megatron_hbp.model.loss import CHUNK_ROWS
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Recompute
from megatron_hbp.planning.cost.profile_table import ProfileHeader
from megatron_hbp.profiling.grid import parse_policies
from megatron_hbp.profiling.main import quiet
from megatron_hbp.profiling.options import ProfileOptions, config_digest
from megatron_hbp.profiling.packs import SyntheticStore
from megatron_hbp.profiling.yardstick import Yardstick
from megatron_hbp.runtime.record import layout_of, versions
from megatron_hbp.runtime.setup import Runtime, set_up


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What every row is run with."""

    runtime: Runtime
    options: ProfileOptions
    model: list[Any]
    optimizer: Any
    """Held for its memory."""
    groups: CpGroups
    control: dist.ProcessGroup
    """gloo, all ranks: where they agree, whatever else they run on."""
    degrees: tuple[int, ...]
    policies: tuple[Recompute, ...]
    header: ProfileHeader
    memory_limit: float | None
    """Bytes, the least of all ranks."""
    yardstick: Yardstick | None
    """None on CUDA."""

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.runtime.args.data_parallel_size

    @property
    def on_cuda(self) -> bool:
        """Whether a device is timed, or this process."""
        return self.runtime.device.type == "cuda"

    def feed(self, plan: Plan) -> Feed:
        """Synthetic tokens for this rank's part of `plan`, again and again."""
        lengths = torch.zeros(plan.data.num_samples, dtype=torch.int64).numpy()
        lengths[plan.sample_ids] = plan.lengths
        store = SyntheticStore(
            lengths=lengths, vocabulary=self.runtime.args.vocab_size, supervised=self.options.supervised
        )
        tiers, _ = self.runtime.resolve(plan)
        return self.runtime.feed(plan, store, tiers, self.groups, cyclic=True)

    def clear_gradients(self) -> None:
        """As before every step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()

    def forward_backward(self, feed: Feed, forward_step: Any = None) -> None:
        """All micro-batches of step 0 of the feed's plan, through Megatron-LM's own schedule; no optimizer step."""
        self.runtime.run_step(
            get_forward_backward_func(), self.model, feed, 0, data_iterator=feed,
            forward_step_func=forward_step or make_forward_step(), seq_length=self.runtime.args.seq_length,
            micro_batch_size=1, forward_only=False,
        )  # fmt: skip


def build(args: Any, options: ProfileOptions) -> Session:
    """Build model, optimizer and groups. Collective over the world.

    Args:
        args: Megatron-LM's arguments.
        options: ours.

    Raises:
        ConfigError: flags that contradict each other, before any process group exists.
    """
    if args.vocab_size is None:
        raise ConfigError("--vocab-size is missing: give that of your tokenizer")
    policies, degrees = parse_policies(options.recompute, args.num_layers), options.degrees(args.data_parallel_size)
    # What is timed is one micro-batch; gradients are reduced once a step, and planned apart.
    args.overlap_grad_reduce = args.overlap_param_gather = False
    on_one = model_of_args(args).attention.on_tensor_parallel_rank(args.tensor_model_parallel_size)
    # the first that all degrees allow, as cost models price an exchange that a plan leaves open
    allowed = (each.name for each in EXCHANGES.values() if not any(each.refusal(on_one, c) for c in degrees))
    hbp = replace(options.hbp, exchange=options.hbp.exchange or next(allowed))
    named = {f"--hbp-profile-recompute {policy}": policy for policy in policies}
    runtime = set_up(args, hbp, policies=named, shapes_vary=args.pipeline_model_parallel_size > 1)
    with quiet():
        training.initialize_megatron()
        chunks, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, runtime.model),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    for chunk in chunks:
        chunk.train()
    get_model_config(chunks[0]).finalize_model_grads_func = None
    optimizer.zero_grad()
    optimizer.step()  # Adam's moments exist from the first step on: they must be in what memory is left
    groups, device, limit = runtime.make_groups(degrees), runtime.device, options.memory
    control = dist.new_group(backend="gloo", timeout=timedelta(minutes=args.distributed_timeout_minutes))
    if device.type == "cuda":
        total = torch.tensor(float(torch.cuda.mem_get_info(device)[1]))
        dist.all_reduce(total, op=dist.ReduceOp.MIN, group=control)
        limit = min(limit or float("inf"), float(total))
    # Half a million objects of libraries live as long as this process: looking through them takes 0.2 s a collection,
    # which every row ends with, and which would fall into a timed micro-batch now and then.
    gc.collect()
    gc.freeze()
    return Session(
        runtime=runtime, options=options, model=chunks, optimizer=optimizer, groups=groups, control=control,
        degrees=degrees, policies=policies, header=_header(runtime, options), memory_limit=limit,
        yardstick=None if device.type == "cuda" else Yardstick(),
    )  # fmt: skip


def _header(runtime: Runtime, options: ProfileOptions) -> ProfileHeader:
    args, on_cuda = runtime.args, runtime.device.type == "cuda"
    assert runtime.options.exchange is not None
    return ProfileHeader(
        device=torch.cuda.get_device_name(runtime.device) if on_cuda else f"CPU {platform.machine()}",
        versions=versions(),
        model=model_of_args(args),
        flags=config_digest(runtime.model.transformer, args),
        layout=layout_of(args),
        dtype=str(args.params_dtype).removeprefix("torch."),
        exchange=runtime.options.exchange,
        supervised=options.supervised,
        logits_bytes=3.0 * 4 * args.padded_vocab_size / args.tensor_model_parallel_size,  # three times fp32
        logits_rows=CHUNK_ROWS,
        memory="reserved and outside the allocator" if on_cuda else "allocated above the states",
    )
