"""Runs on 4 gloo ranks: parameters after two optimizer steps, packs of mixed CP degrees against one sample at a time.

The optimizers are Megatron-LM's own: plain in fp64 and fp32, distributed in fp32 (it refuses doubles). The yardstick is
always the plain one, in the same dtype and layout of ranks, with every sample in a pack of its own at CP 1.

Adam divides a gradient by its own size, so where an element is nearly zero (1e-8, Adam's default epsilon) its fp32
rounding (1e-10) moves the parameter by a part of the learning rate, whatever made the rounding. With that epsilon fp32
ended at 5e-5 (dense) and 2e-4 (MoE) for a rate of 1e-2, and 2e-5 for 1e-4, the same figures for both optimizers. So
fp64 shows exactness with the default epsilon and a high rate, and fp32 runs with an epsilon above its rounding, 1e-6.
"""

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.models import GPTModelConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402

from megatron_hbp.model.spec import with_packed_model  # noqa: E402
from megatron_hbp.parallel.groups import CpGroups  # noqa: E402
from megatron_hbp.planning.types import Tier  # noqa: E402
from megatron_hbp.training import feed, forward  # noqa: E402
from tests.equivalence.models import VOCABULARY, transformer_config  # noqa: E402
from tests.equivalence.plans import MemoryStore, plan_of  # noqa: E402

LENGTHS = [1, 40, 17, 23, 5, 60, 33, 9, 12, 31, 90, 2, 25, 14, 50, 8]
"""Eight samples a step."""
LAYOUTS = (("dense", 1, 1), ("dense", 2, 1), ("moe", 1, 1), ("moe", 1, 2), ("moe", 2, 2))
"""(model, TP, EP)."""
LEARNING_RATE = {torch.float64: 1e-2, torch.float32: 1e-3}
EPSILON = {torch.float64: 1e-8, torch.float32: 1e-6}


def main(result_path: str) -> None:
    """Write {case: largest deviation of a parameter, relative to the largest value of the same parameter}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    results: dict[str, float] = {}
    for kind, tp, ep in LAYOUTS:
        parallel_state.initialize_model_parallel(tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
        num_ranks = parallel_state.get_data_parallel_world_size()
        degrees = [c for c in (1, 2, 4) if c <= num_ranks]
        groups = CpGroups.create(degrees, parallel_state.get_data_parallel_group(), timedelta(minutes=1))
        packed, tiers = packs_of(num_ranks), [Tier(packing_length=128 * c, cp_degree=c) for c in degrees]
        alone = [(s, i // num_ranks, i % num_ranks, 0, [8 * s + i]) for s in range(2) for i in range(8)]
        for dtype in (torch.float64, torch.float32):
            yard = parameters_after(kind, dtype, groups, alone, tiers, distributed=False)
            case, width = f"{kind} tp{tp} ep{ep}", str(dtype)[6:]
            plain = parameters_after(kind, dtype, groups, packed, tiers, distributed=False)
            results[f"{case} plain {width}"] = worst(plain, yard)
            results[f"{case} {width} moved"] = worst(start(kind, dtype), yard)
        spread = parameters_after(kind, dtype, groups, packed, tiers, distributed=True)
        results[f"{case} distributed {width}"] = worst(spread, yard)
        results[f"{case} distributed against plain"] = worst(spread, plain)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def packs_of(num_ranks: int) -> list[tuple[int, int, int, int, list[int]]]:
    """Two steps of eight samples: the widest degree, then narrower ones side by side, then one rank alone."""
    if num_ranks == 4:
        of_step = [(0, 0, 2, [5, 0, 1]), (1, 0, 1, [2, 3]), (1, 2, 0, [4, 6]), (1, 3, 0, [7])]
    else:
        of_step = [(0, 0, 1, [5, 0, 1, 2]), (1, 0, 0, [3, 4]), (1, 1, 0, [6]), (2, 0, 1, [7])]
    return [
        (step, slot, rank0, tier, [8 * step + i for i in samples])
        for step in range(2)
        for slot, rank0, tier, samples in of_step
    ]


def build(kind: str, dtype: torch.dtype, *, distributed: bool = False, seed: int = 7, **changes: Any) -> list:
    """Our tiny model in a dtype of choice, wrapped by Megatron-LM's DDP."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    types = {"params_dtype": dtype, "pipeline_dtype": dtype}
    if kind == "moe":
        types["moe_router_dtype"] = "fp64" if dtype == torch.float64 else "fp32"
    config = with_packed_model(
        GPTModelConfig(
            transformer=transformer_config(kind, **types, **changes), vocab_size=VOCABULARY, seq_length=256,
            position_embedding_type="rope", share_embeddings_and_output_weights=False,
        )
    )  # fmt: skip
    config.pre_wrap_hooks.append(lambda chunks: [chunk.to(dtype) for chunk in chunks])  # the router's weight is fp32
    return GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=False, use_distributed_optimizer=distributed),
        data_parallel_random_init=False,
    )


def start(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters before any step."""
    return {name: p.detach().clone() for name, p in build(kind, dtype)[0].module.named_parameters()}


def parameters_after(
    kind: str, dtype: torch.dtype, groups: CpGroups, packs: Sequence, tiers: Sequence[Tier], *, distributed: bool
) -> dict[str, torch.Tensor]:
    """The parameters after the two steps of `packs`."""
    chunks = build(kind, dtype, distributed=distributed)
    config = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE[dtype], adam_eps=EPSILON[dtype], weight_decay=0.1, adam_beta2=0.95,
        params_dtype=dtype, use_distributed_optimizer=distributed,
        clip_grad=0.5 if dtype == torch.float32 else 0.0,  # its norm is fp32: no yardstick of 1e-10
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, chunks)
    store = MemoryStore.random(LENGTHS, vocabulary=VOCABULARY)
    plan = plan_of(
        packs, tiers=tiers, lengths=store.lengths, num_ranks=parallel_state.get_data_parallel_world_size()
    )
    batches = feed.Feed(
        plan=plan, store=store, groups=groups, rank=parallel_state.get_data_parallel_rank(),  # type: ignore[arg-type]
        unit=parallel_state.get_tensor_model_parallel_world_size(), full_length=False, device=torch.device("cpu"),
    )  # fmt: skip
    for step in range(plan.num_steps):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward.make_forward_step(), data_iterator=batches, model=chunks,
            num_microbatches=int(plan.num_micro_batches[step]), seq_length=256, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        updated, *_ = optimizer.step()
        assert updated
    return {name: p.detach().clone() for name, p in chunks[0].module.named_parameters()}


def worst(mine: dict[str, torch.Tensor], yard: dict[str, torch.Tensor]) -> float:
    """Largest |mine - yard| relative to the largest |yard| of the same parameter, over parameters and ranks."""
    assert mine.keys() == yard.keys(), mine.keys() ^ yard.keys()
    here = max(float((mine[k] - yard[k]).abs().max() / yard[k].abs().max()) for k in yard)
    anywhere = torch.tensor(here, dtype=torch.float64)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return anywhere.item()


if __name__ == "__main__":
    main(sys.argv[-1])
