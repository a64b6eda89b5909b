"""Steps of a hand-written plan through our feed, forward step and Megatron-LM's own schedule, on gloo ranks."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_hbp.feed import feed, forward
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model.recompute import RecomputeSwitch
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.runtime.setup import pipeline_arguments
from tests.equivalence.support.plans import MemoryStore, plan_of

Packs = Sequence[tuple[int, int, int, int, Sequence[int]]]


class Stepper:
    """A model under the current layout of ranks, on which plans are run."""

    def __init__(self, chunks: list, store: MemoryStore, cp: Sequence[int] | CpGroups):
        """`cp`: the CP degrees, or their groups, which are worth sharing (0.1 s each on two cores, and threads)."""
        self.chunks, self.store = chunks, store
        self.num_ranks = parallel_state.get_data_parallel_world_size()
        self.groups = cp if isinstance(cp, CpGroups) else groups_of(cp)
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.losses: list[dict[str, torch.Tensor]] = []

    def gradients(
        self, packs: Packs, tiers: Sequence[Tier], *, fixed_shapes: bool = False, extra_unit: int = 1
    ) -> dict[str, torch.Tensor]:
        """Gradients (of this rank's shard) of a plan of one step: {chunk and parameter: tensor}."""
        for _ in self.steps(packs, tiers, fixed_shapes=fixed_shapes, extra_unit=extra_unit):
            pass
        return named_gradients(self.chunks)

    def steps(
        self,
        packs: Packs,
        tiers: Sequence[Tier],
        *,
        fixed_shapes: bool = False,
        extra_unit: int = 1,
        forward_step: Callable | None = None,
        schedule: str = "lockstep",
        read_ahead: int = 0,
    ) -> Iterator[int]:
        """Accumulate the gradients of one step after the other; yields its number after each."""
        plan = plan_of(packs, tiers=tiers, lengths=self.store.lengths, num_ranks=self.num_ranks)
        plan = dataclasses.replace(plan, schedule=schedule)
        feeds = [
            feed.Feed(
                plan=plan, store=self.store, groups=self.groups, rank=parallel_state.get_data_parallel_rank(),  # type: ignore[arg-type]
                unit=self.tp * extra_unit, full_length=fixed_shapes, device=torch.device("cpu"),
                joint_recompute=parallel_state.get_expert_model_parallel_world_size() > 1, read_ahead=read_ahead,
            )
            for _ in self.chunks
        ]  # fmt: skip
        switch = RecomputeSwitch(self.chunks)
        for step in range(plan.num_steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
                chunk.module.config.variable_seq_lengths = not fixed_shapes
            over_the_wire = mock.patch.object(
                P2PCommunicator, "_communicate_shapes", side_effect=AssertionError("a shape was sent over the wire")
            )
            planned = pipeline_arguments(self.chunks, feeds[0], step)
            with micro_batch_context.on_bind(switch), over_the_wire:
                self.losses = get_forward_backward_func()(
                    forward_step_func=forward_step or forward.make_forward_step(),
                    data_iterator=feeds if len(feeds) > 1 else feeds[0],
                    model=self.chunks,
                    num_microbatches=len(feeds[0].slots(step)),
                    seq_length=tiers[0].local_tokens,
                    micro_batch_size=1,
                    forward_only=False,
                    **planned,
                )
            yield step


@contextlib.contextmanager
def laid_out(*, tp: int = 1, pp: int = 1, vp: int | None = None, ep: int = 1) -> Iterator[None]:
    """A layout of the ranks, undone after its use with all its groups.

    Megatron-LM only forgets its groups. Each has a thread that gloo wakes a hundred times a second, 200 on each rank
    after ten layouts: half of the processor time went to the kernel.
    """
    parallel_state.initialize_model_parallel(tp, pp, vp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def groups_of(degrees: Sequence[int]) -> CpGroups:
    """The CP groups of the current layout of ranks."""
    return CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timedelta(minutes=5))


def named_gradients(chunks: list) -> dict[str, torch.Tensor]:
    """Chunk and parameter name -> accumulated gradient."""
    return {
        f"{index}.{name}": parameter.main_grad.clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }


def worst(mine: dict[str, Any], yard: dict[str, Any]) -> float:
    """Largest |mine - yard| relative to the largest |yard| of the same parameter, over parameters and ranks."""
    assert mine.keys() == yard.keys(), mine.keys() ^ yard.keys()
    here = max(float((mine[k] - yard[k]).abs().max() / yard[k].abs().max().clamp_min(1e-30)) for k in yard)
    anywhere = torch.tensor(here, dtype=torch.float64)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return anywhere.item()


def alone(num_samples: int, num_ranks: int, tier: int = 0) -> list[tuple[int, int, int, int, list[int]]]:
    """Packs of one sample each, distributed over the ranks."""
    return [(0, i // num_ranks, i % num_ranks, tier, [i]) for i in range(num_samples)]
