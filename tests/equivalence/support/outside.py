"""Runs on 4 gloo ranks: ten optimizer steps of packs at CP 1, 2, 4 and mixed against Hugging Face, each sample alone.

The judge is `transformers`' own LlamaForCausalLM, DeepseekV3ForCausalLM and DeepseekV2ForCausalLM with eager
attention. The parity traps are resolved by the config: plain rotary (no YaRN: transformers before 5.23 left its factor
out of V2's softmax), and epsilon 1e-6 everywhere (V2 and V3 take that one for their latents whatever the config says).

    deepseek          V3: sigmoid scores normalised over the chosen experts, one group of experts, no correction bias
    deepseek-v2       V2: `group_limited_greedy`, 4 groups of 3 experts of which the 2 with the *best single* expert are
                      searched for 4; softmax scores as they are, times 2.5. The reference is transformers' own code,
                      DeepseekV2TopkRouter, which is the V2 paper's rule (section 2.2.2). With 4 experts from 2 groups
                      megatron-core would sum two a group; `SUMMED` runs that and must be seen.
    deepseek-v2-lite  the same with queries that have no latent, as V2-Lite's (`q_lora_rank` None)

Both code bases cast to fp32 by name, whatever the dtype of the model. In the fp64 cases `lifted` lifts these casts:
Hugging Face's in RMSNorm, in the softmax of eager attention and in the router; Megatron-LM's in the router's scores.
The rotary tables stay fp32 on both sides and are equal to the bit. Each step has 128 supervised tokens, so that
Megatron-LM's 1 / num_tokens, which it takes in fp32, is exact.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from transformers import (  # noqa: E402
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from megatron_hbp.feed import feed, forward  # noqa: E402
from megatron_hbp.model.router import PackedRouter  # noqa: E402
from megatron_hbp.parallel.groups import CpGroups  # noqa: E402
from megatron_hbp.planning.core.tiers import Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402

STEPS, SUPERVISED = 10, 128
WORDS = 12
"""Only these appear in the samples: something to learn in ten steps."""
LENGTHS = [1, 40, 17, 23, 5, 60, 33, 9]
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TIERS = (Tier(packing_length=128), Tier(packing_length=256, cp_degree=2), Tier(packing_length=256, cp_degree=4))
# name -> (slot, rank0, tier, samples of the step)
PACKS = {
    "cp 1": [(0, 0, 0, [0, 1]), (0, 1, 0, [2, 3]), (0, 2, 0, [4, 5]), (0, 3, 0, [6, 7])],
    "cp 2": [(0, 0, 1, [1, 0, 3, 5]), (0, 2, 1, [2, 4, 6, 7])],
    "cp 4": [(0, 0, 2, [7, 0, 1, 2, 3, 4, 5, 6])],
    "cp 1, 2, 4": [(0, 0, 2, [5, 1, 0]), (1, 0, 1, [2, 6]), (1, 2, 0, [3, 4]), (1, 3, 0, [7])],
}
KINDS = ("llama", "deepseek", "deepseek-v2", "deepseek-v2-lite")
CASES = [(kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.float64)]
MIXED = "cp 1, 2, 4"
UNLIFTED = "deepseek float64, router scores in fp32"
SUMMED = "deepseek-v2 float64, groups by the sum of their best"
SPREAD = "deepseek-v2 float64 cp 1, 2, 4, ep 2"


def main(result_path: str) -> None:
    """Write {case: {"losses": ours, "judge": theirs}}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    parallel_state.initialize_model_parallel()
    groups = CpGroups.create((2, 4), parallel_state.get_data_parallel_group(), timedelta(minutes=1))
    store = store_of_steps()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, {case: judge(*case, store) for case in CASES[rank::ranks]})
    judged = {case: losses for part in parts for case, losses in part.items()}
    results = {}

    def compare(name: str, kind: str, dtype: torch.dtype, packs: str = MIXED, *, lift: bool = True) -> None:
        with lifted() if lift and dtype == torch.float64 else contextlib.nullcontext():
            ours = train(kind, dtype, store, groups, PACKS[packs])
        results[name] = {"losses": ours, "judge": judged[kind, dtype]}

    for kind, dtype in CASES:
        for packs in PACKS if kind != "deepseek-v2-lite" else [MIXED]:  # its queries have nothing to do with packs
            compare(f"{kind} {str(dtype)[6:]} {packs}", kind, dtype, packs)
    compare(UNLIFTED, "deepseek", torch.float64, lift=False)
    with mock.patch.object(PackedRouter, "_group_limited", lambda self, logits: None):
        compare(SUMMED, "deepseek-v2", torch.float64)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    groups = CpGroups.create((2, 4), parallel_state.get_data_parallel_group(), timedelta(minutes=1))
    compare(SPREAD, "deepseek-v2", torch.float64)
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def store_of_steps() -> MemoryStore:
    """Eight samples a step, shuffled anew, of which exactly 128 tokens are to be predicted."""
    rng = np.random.default_rng(11)
    samples = []
    for _ in range(STEPS):
        lengths = [int(n) for n in LENGTHS]
        masks = [np.zeros(n, np.uint8) for n in lengths]
        places = [(i, j) for i, n in enumerate(lengths) for j in range(1, n)]
        for index in rng.choice(len(places), SUPERVISED, replace=False):
            i, j = places[index]
            masks[i][j] = 1
        samples += [(rng.integers(0, WORDS, n).astype(np.int64), m) for n, m in zip(lengths, masks, strict=True)]
    return MemoryStore(samples=samples)


# ---------------------------------------------------------------- the judge


class _WideTorch:
    """The torch module, whose float32 is float64."""

    float32 = torch.float64

    @staticmethod
    def polar(radius: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """V2's fp32 rotary table by cos and sin, as everyone else's: polar is an ulp off, 7e-11 in the loss."""
        return torch.complex(radius * angle.cos(), radius * angle.sin())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Keep fp64 where the sources name fp32."""
    to_float = torch.Tensor.float

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for module in (modeling_llama, modeling_deepseek_v2, modeling_deepseek_v3, moe_utils):
            stack.enter_context(mock.patch.object(module, "torch", _WideTorch()))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", keep))
        yield


def hugging_face(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """The tiny reference model; the same weights in every process and dtype."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 8, "tie_word_embeddings": False, "attn_implementation": "eager",
        "initializer_range": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    torch.manual_seed(5)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, rms_norm_eps=1e-5))
    else:
        common |= {
            "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "moe_intermediate_size": 16, "n_shared_experts": 2,
            "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 24, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "experts_implementation": "eager",
        }  # fmt: skip
        if kind == "deepseek":
            config = DeepseekV3Config(
                **common, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=True,
                rope_interleave=True,
            )  # fmt: skip
            model = DeepseekV3ForCausalLM(config)
        else:
            if kind == "deepseek-v2-lite":
                common["q_lora_rank"] = None
            config = DeepseekV2Config(
                **common, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2,
                topk_method="group_limited_greedy",
            )  # fmt: skip
            model = DeepseekV2ForCausalLM(config)
    return model.to(dtype).train()


def judge(kind: str, dtype: torch.dtype, store: MemoryStore) -> list[float]:
    """Losses of ten steps, every sample alone."""
    model = hugging_face(kind, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    with lifted() if dtype == torch.float64 else contextlib.nullcontext():
        for step in range(STEPS):
            total = 0.0
            for tokens, mask in store.samples[step * len(LENGTHS) : (step + 1) * len(LENGTHS)]:
                rows = torch.from_numpy(np.flatnonzero(mask[1:]))
                ids = torch.from_numpy(tokens)
                logits = model(ids[None], use_cache=False).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1], reduction="sum") / SUPERVISED
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


# ---------------------------------------------------------------- ours


def train(kind: str, dtype: torch.dtype, store: MemoryStore, groups: CpGroups, packs: list) -> list[float]:
    """Losses of ten steps of packs from the same weights."""
    chunks = megatron(kind, dtype)
    load(chunks[0].module, hugging_face(kind, dtype).state_dict())
    parameters = list(chunks[0].parameters())
    optimizer = torch.optim.AdamW(parameters, **ADAM)
    of_step = [
        (step, slot, rank0, tier, [step * len(LENGTHS) + i for i in samples])
        for step in range(STEPS)
        for slot, rank0, tier, samples in packs
    ]
    plan = plan_of(of_step, tiers=TIERS, lengths=store.lengths, num_ranks=4)
    batches = feed.Feed(
        plan=plan, store=store, groups=groups, rank=dist.get_rank(), unit=1, full_length=False,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )  # fmt: skip
    sums: list[torch.Tensor] = []

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output, loss_sum = forward.make_forward_step()(batches, model)
        sums.append(output.detach().sum())  # loss_sum's own report is fp32
        return output, loss_sum

    losses = []
    for step in range(STEPS):
        chunks[0].zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches, model=chunks,
            num_microbatches=int(plan.num_micro_batches[step]), seq_length=256, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        for parameter in parameters:
            parameter.grad = parameter.main_grad.clone()
        optimizer.step()
        optimizer.zero_grad()  # Megatron-LM's hook would add what .grad still holds to the next main_grad
        total = torch.stack(sums).sum().double()
        dist.all_reduce(total)
        losses.append(total.item() / SUPERVISED)
        sums.clear()
    return losses


def megatron(kind: str, dtype: torch.dtype) -> list:
    """Our model of the same architecture."""
    changes: dict[str, Any] = {}
    if kind == "deepseek":
        changes = {
            "layernorm_epsilon": 1e-6, "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False,
            "moe_router_topk_scaling_factor": 2.5,
        }  # fmt: skip
    elif kind != "llama":
        changes = {
            "layernorm_epsilon": 1e-6, "num_moe_experts": 12, "moe_router_topk": 4, "moe_router_num_groups": 4,
            "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5,
            **({"q_lora_rank": None} if kind == "deepseek-v2-lite" else {}),
        }  # fmt: skip
    return build("dense" if kind == "llama" else "moe", dtype=dtype, **changes)


def load(model: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """Copy Hugging Face's weights; every parameter of ours is set, every one of theirs is used."""
    left = dict(theirs)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_weight_of(name, model.config, left).reshape(parameter.shape))
    unused = {name for name in left if not name.endswith("e_score_correction_bias")}
    assert not unused, unused


PLAIN = {
    "input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj", "mlp.router": "mlp.gate",
    "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj", "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm", "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
}  # fmt: skip


def _weight_of(name: str, config: Any, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight that Megatron-LM calls `name`; what is taken whole leaves `theirs`."""
    top = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in top:
        return theirs.pop(top[name])
    layer, part = name.removeprefix("decoder.layers.").removesuffix(".weight").split(".", 1)
    prefix = f"model.layers.{layer}."
    if part in PLAIN:
        return theirs.pop(f"{prefix}{PLAIN[part]}.weight")
    if part == "self_attention.linear_qkv":  # by group: its query heads, its key head, its value head
        groups, hidden = config.num_query_groups, config.hidden_size
        qkv = [theirs.pop(f"{prefix}self_attn.{x}_proj.weight").view(groups, -1, hidden) for x in "qkv"]
        return torch.cat(qkv, dim=1)
    if part.startswith("mlp.experts.local_experts."):
        expert, matrix = part.removeprefix("mlp.experts.local_experts.").split(".")
        stacked = f"{prefix}mlp.experts.{'gate_up_proj' if matrix == 'linear_fc1' else 'down_proj'}"
        held = config.num_moe_experts // config.expert_model_parallel_size
        last = int(expert) == held - 1
        first = parallel_state.get_expert_model_parallel_rank() * held
        return (theirs.pop(stacked) if last else theirs[stacked])[first + int(expert)]
    assert part.endswith("linear_fc1"), name
    where = prefix + part.removesuffix("linear_fc1")
    return torch.cat([theirs.pop(f"{where}{x}_proj.weight") for x in ("gate", "up")])


if __name__ == "__main__":
    main(sys.argv[-1])
