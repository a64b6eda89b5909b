"""Runs on 4 gloo ranks: MLA's latents exchanged, against one sample at a time, in fp64 (the optimizer in fp32).

The packs have shared samples and local samples, samples of one token, and a sample of three tokens on four ranks, so
that one rank has none of it. Under tensor parallelism a second yardstick is the same model without it, with equal
weights: a gradient that tensor parallelism loses is lost in one sample at a time as well.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.transformer.multi_latent_attention import MLASelfAttention  # noqa: E402

from megatron_hbp.model import latents, loss, sliced  # noqa: E402
from megatron_hbp.model.exchange import collectives, kv_latent, qkv_latent  # noqa: E402
from megatron_hbp.model.mla import PackedMLASelfAttention  # noqa: E402
from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.planning.core.exchanges import EXCHANGES  # noqa: E402
from megatron_hbp.planning.core.model import AttentionShape  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from tests.equivalence.support import matrix, models  # noqa: E402
from tests.equivalence.support.factors import Case  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.packs_of_case import one_by_one, packs_of  # noqa: E402
from tests.equivalence.support.plans import MemoryStore  # noqa: E402
from tests.equivalence.support.stepping import Packs, Stepper, alone, groups_of, laid_out, worst  # noqa: E402

LENGTHS = [90, 1, 12, 25, 70, 33, 3, 17, 40, 1, 60, 5, 100, 95, 23, 9]
# (step, slot, rank0, tier, samples); nothing of [9] is shared, and the last slot leaves ranks idle
FOUR_RANKS: Packs = [
    (0, 0, 0, 2, [12, 1, 13, 14]), (0, 1, 0, 1, [0, 2, 3]), (0, 1, 2, 1, [4, 5]), (0, 2, 0, 2, [6]),
    (0, 3, 0, 1, [9]), (0, 3, 2, 1, [10, 11, 15]), (0, 4, 1, 0, [7, 8]),
]  # fmt: skip
TWO_RANKS: Packs = [
    (0, 0, 0, 1, [12, 1, 13, 14]), (0, 1, 0, 1, [0, 2, 9, 3]), (0, 2, 0, 1, [6]), (0, 3, 0, 0, [4, 5]),
    (0, 3, 1, 0, [7, 8]), (0, 4, 0, 1, [10, 11, 15]),
]  # fmt: skip
MIXED: tuple[tuple[str, str], ...] = (
    ("qkv_latent", "qkv_latent"), ("kv_latent", "kv_latent"), ("qkv_latent", "p2p"), ("all_gather", "kv_latent"),
)  # fmt: skip
"""Exchanges of CP 2 and CP 4."""
LATENT: tuple[str, str] = ("qkv_latent", "kv_latent")
ALONE = (Tier(packing_length=128),)
NONE = Recompute()
FULL = Recompute(granularity="full", num_layers=2)
UP = Recompute(granularity="selective", modules=("mla_up_proj",))
CORE = Recompute(granularity="selective", modules=("core_attn",))
BOTH = Recompute(granularity="selective", modules=("core_attn", "mla_up_proj"))
POLICIES = {"none": NONE, "mla_up_proj": UP, "core_attn": CORE, "mla_up_proj+core_attn": BOTH, "full": FULL}
DENSE = {
    "num_moe_experts": None, "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": None,
    "moe_ffn_hidden_size": None, "gated_linear_unit": False, "num_layers": 1,
}  # fmt: skip
"""MLA without experts, which TP does not tie to sequence parallelism, and whose shards lie one below the other."""

PLAIN_QUERIES = {"q_lora_rank": None, "qk_layernorm": False}
"""Queries from hidden states; Megatron-LM's local spec (0.19.2) has no norm of latents then."""


def main(result_path: str) -> None:
    """Run every case and write {case: figure}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    install_context_capture()
    results: dict[str, Any] = {}
    for part in (one_layout, experts, tensor_parallel, distributed_optimizer):
        part(results)
        if dist.get_rank() == 0:
            print(json.dumps(results, indent=1), flush=True)
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def stepper_of(**changes: Any) -> Stepper:
    """The MLA model under the current layout."""
    num_ranks = parallel_state.get_data_parallel_world_size()
    store = MemoryStore.random([*LENGTHS, 64], vocabulary=VOCABULARY)
    return Stepper(build("moe", **{"num_layers": 2, **changes}), store, [c for c in (1, 2, 4) if c <= num_ranks])


def singles(stepper: Stepper) -> dict[str, torch.Tensor]:
    """Gradients of one sample at a time."""
    return stepper.gradients(alone(len(LENGTHS), stepper.num_ranks), ALONE)


def packed(stepper: Stepper, *exchanges: str, policy: Recompute = NONE) -> dict[str, torch.Tensor]:
    """Gradients of the packs, with one exchange for each degree from 2 on."""
    tiers = [Tier(packing_length=128, recompute=policy)]
    for c, exchange in zip((2, 4), exchanges, strict=False):
        tiers.append(Tier(packing_length=128 * c, cp_degree=c, exchange=exchange, recompute=policy))
    two = stepper.num_ranks == 2
    return stepper.gradients(TWO_RANKS if two else FOUR_RANKS, tiers[:2] if two else tiers)


def one_layout(results: dict[str, Any]) -> None:
    """All recompute policies, exchanges mixed, breakages, bytes, queries without compression."""
    with laid_out():
        stepper = stepper_of()
        yard = singles(stepper)
        for name, policy in POLICIES.items():
            # both ways round where the exchanges differ in what they recompute
            for pair in (LATENT, LATENT[::-1])[: 1 + (policy is UP)]:
                case = f"cp2 {pair[0]}, cp4 {pair[1]} recompute={name}"
                with hook_calls(stepper, results, f"hooks {case}"):
                    mine = packed(stepper, *pair, policy=policy)
                results[case] = worst(mine, yard)
        for pair in MIXED:
            results[f"cp2 {pair[0]}, cp4 {pair[1]}"] = worst(packed(stepper, *pair), yard)
        with mock.patch.object(latents, "sliced_linear", ordinary_layer):
            for name in ("none", "mla_up_proj"):
                mine = packed(stepper, *LATENT, policy=POLICIES[name])
                results[f"local samples through an ordinary layer recompute={name}"] = worst(mine, yard)
        for name, (exchange, breakage) in BREAKAGES.items():
            with breakage():
                results[f"broken: {name}"] = worst(packed(stepper, exchange, exchange), yard)
        for exchange in LATENT:
            for c in (2, 4):
                results[f"bytes {exchange} cp{c}"] = received(stepper, exchange, c)
        stepper = stepper_of(**PLAIN_QUERIES)
        yard = singles(stepper)
        mine = packed(stepper, *LATENT, policy=UP)
        results[f"q_lora_rank=None cp2 {LATENT[0]}, cp4 {LATENT[1]} recompute=mla_up_proj"] = worst(mine, yard)


def ordinary_layer(x: torch.Tensor, weight: torch.Tensor, rows: slice, owner: torch.Tensor) -> torch.Tensor:
    """All rows in the ordinary way: autograd adds this gradient to what the slices return, before DDP's hook."""
    if rows.stop - rows.start == len(weight):
        return torch.nn.functional.linear(x, weight)
    return sliced.sliced_linear(x, weight, rows, owner)


def experts(results: dict[str, Any]) -> None:
    """Expert parallelism."""
    with laid_out(ep=2):
        stepper = stepper_of()
        yard = singles(stepper)
        results["ep2, cp2 kv_latent, cp4 qkv_latent recompute=full"] = worst(
            packed(stepper, *LATENT[::-1], policy=FULL), yard
        )


def tensor_parallel(results: dict[str, Any]) -> None:
    """TP 2 against one sample at a time, and against TP 1."""
    with laid_out(tp=2):
        for q_lora_rank in (24, None):
            stepper = stepper_of(**({} if q_lora_rank else PLAIN_QUERIES))
            yard = singles(stepper)
            for exchange in LATENT if q_lora_rank else LATENT[:1]:
                mine = packed(stepper, exchange, policy=UP if q_lora_rank else NONE)
                results[f"tp2 {exchange} q_lora_rank={q_lora_rank}"] = worst(mine, yard)
    with laid_out():
        yard = singles(stepper_of(**DENSE))
    with laid_out(tp=2):
        for sequence_parallel in (True, False):
            stepper = stepper_of(**DENSE, sequence_parallel=sequence_parallel)
            case = f"tp2 against tp1, {'with' if sequence_parallel else 'without'} sequence parallelism"
            with mock.patch.object(
                PackedMLASelfAttention, "_qkv_down_projection", MLASelfAttention._qkv_down_projection
            ):
                theirs = whole_gradients(stepper, singles(stepper))
                results[f"{case}, Megatron-LM's"] = worst(theirs, yard)
                results[f"{case}, Megatron-LM's by parameter"] = by_parameter(theirs, yard)
            for exchange in ("a2a", "p2p", "qkv_latent", "kv_latent"):
                results[f"{case}, {exchange}"] = worst(whole_gradients(stepper, packed(stepper, exchange)), yard)
            with mock.patch.object(loss, "CHUNK_ROWS", 8):  # all but the last chunk come once more in the backward
                results[f"{case}, chunked loss"] = worst(whole_gradients(stepper, packed(stepper, "a2a")), yard)


def distributed_optimizer(results: dict[str, Any]) -> None:
    """Parameters after two steps in fp32, gradients reduced and parameters gathered while others compute.

    Adam's epsilon is 1e-5: at 1e-6 it makes 9e-6 of fp32 rounding (7e-6 under a2a), which hides what 1e-5 is to show.
    """

    def config_of(**kwargs: Any) -> DistributedDataParallelConfig:
        overlap = kwargs["use_distributed_optimizer"]
        return DistributedDataParallelConfig(**kwargs, overlap_grad_reduce=overlap, overlap_param_gather=overlap)

    def optimizer_of(config: Any, chunks: list) -> Any:
        made, (ddp,) = get_megatron_optimizer(config, chunks), chunks
        if ddp.ddp_config.overlap_param_gather:
            ddp.module.config.no_sync_func = ddp.no_sync  # as Megatron-LM's training loop does
            step, steps_left = made.step, [2]

            def last_gathers() -> Any:
                done = step()
                steps_left[0] -= 1
                if not steps_left[0]:
                    ddp.disable_forward_pre_hook()
                return done

            made.step = last_gathers
        return made

    get_megatron_optimizer = matrix.get_megatron_optimizer
    case = Case(model="moe", ranks=4, cp="mixed", optimizer="distributed")
    exchanges: dict[int, str] = {1: "a2a", 2: "qkv_latent", 4: "kv_latent"}
    tiers = [
        replace(tier, exchange=exchanges[tier.cp_degree], recompute=UP if tier.cp_degree == 2 else NONE)
        for tier in matrix.tiers_of(case)
    ]
    with laid_out():
        groups = groups_of((2, 4))
        with (
            mock.patch.object(matrix, "get_megatron_optimizer", optimizer_of),
            mock.patch.object(models, "DistributedDataParallelConfig", config_of),
        ):
            plain = [Tier(packing_length=matrix.LOCAL_TOKENS)]
            yard = matrix.train(replace(case, optimizer="plain"), torch.float32, groups, one_by_one(case), plain)
            mine = matrix.train(case, torch.float32, groups, packs_of(case), tiers)
        results["fp32 distributed optimizer"] = worst(mine.parameters, yard.parameters)


def whole_gradients(stepper: Stepper, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients put together from the tensor-parallel ranks; of what all ranks have whole, this rank's."""
    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for index, chunk in enumerate(stepper.chunks):
        for name, parameter in chunk.module.named_parameters():
            grad = mine[f"{index}.{name}"]
            if getattr(parameter, "tensor_model_parallel", False):
                parts = [torch.empty_like(grad) for _ in range(group.size())]
                dist.all_gather(parts, grad.contiguous(), group=group)
                grad = torch.cat(parts, dim=parameter.partition_dim)
            whole[f"{index}.{name}"] = grad
    return whole


def by_parameter(mine: dict[str, torch.Tensor], yard: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative deviation of each parameter that deviates, largest first."""
    each = {k: float((mine[k] - yard[k]).abs().max() / yard[k].abs().max()) for k in yard}
    return {k: each[k] for k in sorted(each, key=each.__getitem__, reverse=True) if each[k] > 1e-12}


@contextlib.contextmanager
def hook_calls(stepper: Stepper, results: dict[str, Any], case: str) -> Iterator[None]:
    """How often a step runs the hooks of the up-projections' weights: [least, most] over weights."""
    calls: dict[str, int] = {}
    handles = []
    for name, parameter in stepper.chunks[0].module.named_parameters():
        if "_up_proj" in name:
            calls[name] = 0

            def called(_: Any, name: str = name) -> None:
                calls[name] += 1

            handles.append(parameter.register_post_accumulate_grad_hook(called))
    yield
    for handle in handles:
        handle.remove()
    results[case] = [min(calls.values()), max(calls.values())]


def received(stepper: Stepper, exchange: str, cp_degree: int) -> list[float]:
    """[bytes that this rank receives in a layer's forward of a pack of one sample, what planning says]."""
    seen: list[int] = []

    def attention(self: Any, *args: Any) -> Any:
        with collectives.count_traffic(node_size=8) as traffic:
            out = plain(self, *args)
        seen.append(traffic.inside)
        return out

    plain = latents.UpProjection.attention
    tiers = [ALONE[0], Tier(packing_length=64, cp_degree=cp_degree, exchange=exchange)]
    packs = [(0, 0, rank0, 1, [len(LENGTHS)]) for rank0 in range(0, 4, cp_degree)][:1]
    with mock.patch.object(latents.UpProjection, "attention", attention):
        stepper.gradients(packs, tiers)
    c = stepper.chunks[0].module.config
    shape = AttentionShape(
        num_query_heads=c.num_attention_heads, num_kv_heads=c.num_attention_heads,
        qk_width=c.qk_head_dim + c.qk_pos_emb_head_dim, v_width=c.v_head_dim, q_latent=c.q_lora_rank,
        kv_latent=c.kv_lora_rank, rope_width=c.qk_pos_emb_head_dim,
    )  # fmt: skip
    assert len(seen) == c.num_layers or not seen, seen
    return [max(seen, default=0), EXCHANGES[exchange].elements(shape, cp_degree) * (64 // cp_degree) * 8]


# ------------------------------------------------------------ broken on purpose: each must show in the gradients


@contextlib.contextmanager
def _local_positions() -> Iterator[None]:
    """Gathered queries are rotated as if every rank's tokens began a sample."""

    def local(shared: Any) -> torch.Tensor:
        return torch.cat([torch.arange(n) for n in shared.counts])

    with mock.patch.object(qkv_latent, "query_positions", local):
        yield


@contextlib.contextmanager
def _other_heads() -> Iterator[None]:
    """Every rank up-projects the heads of rank 0."""
    with mock.patch.object(qkv_latent, "own_heads", lambda num_heads, cp_rank: range(num_heads)):
        yield


@contextlib.contextmanager
def _wrong_rows() -> Iterator[None]:
    """The gradient of a slice goes to the first rows of the weight."""

    def first_rows(self: Any, rows: slice, grad: torch.Tensor, x: torch.Tensor) -> None:
        add(self, slice(0, grad.shape[1]), grad, x)

    add = sliced.WeightGradient.add
    with mock.patch.object(sliced.WeightGradient, "add", first_rows):
        yield


@contextlib.contextmanager
def _step_left_out() -> Iterator[None]:
    """The ring does not look at what came from the rank before."""

    def blind(shared: Any, rank: int) -> Sequence:
        before = (shared.ranges_of.index(tuple((r.start, r.end) for r in shared.ranges)) - 1) % len(shared.counts)
        return () if rank == before else visible(shared, rank)

    visible = kv_latent.visible
    with mock.patch.object(kv_latent, "visible", blind):
        yield


BREAKAGES: dict[str, tuple[str, Any]] = {
    "local positions of gathered queries": ("qkv_latent", _local_positions),
    "heads of another rank": ("qkv_latent", _other_heads),
    "gradient of a slice in the wrong rows": ("qkv_latent", _wrong_rows),
    "a step of the ring left out": ("kv_latent", _step_left_out),
}

if __name__ == "__main__":
    main(sys.argv[-1])
