"""Tiny dense and DeepSeek-V2-style models, fp64 unless asked, built by Megatron-LM from our specs, for exactness."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder

from megatron_hbp.model.spec import with_packed_model

VOCABULARY = 64


def transformer_config(kind: str, **changes: Any) -> TransformerConfig:
    """Dense: GQA, SwiGLU, RMSNorm, RoPE. "moe": MLA, shared and routed experts, first layer dense; `changes` last."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    vp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    common: dict[str, Any] = dict(  # noqa: C408
        num_layers=3,
        hidden_size=32,
        num_attention_heads=8,
        ffn_hidden_size=48,
        params_dtype=torch.float64,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        virtual_pipeline_model_parallel_size=vp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        transformer_impl="local",
        pipeline_dtype=torch.float64,
        # as Megatron-LM's arguments set it for interleaved stages; batched, two stages would mix up their messages
        overlap_p2p_comm=vp is not None,
        batch_p2p_comm=vp is None,
    )
    if kind == "dense":
        return TransformerConfig(**{**common, "num_query_groups": 2, **changes})
    moe: dict[str, Any] = dict(  # noqa: C408
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
        qk_layernorm=True,
        rope_type="rope",
        num_moe_experts=8,
        moe_ffn_hidden_size=16,
        moe_router_topk=2,
        moe_layer_freq=[0, *[1] * (changes.get("num_layers", common["num_layers"]) - 1)],
        moe_shared_expert_intermediate_size=32,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,
        moe_router_dtype="fp64",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
    )
    return MLATransformerConfig(**{**common, **moe, **changes})


def build(
    kind: str,
    *,
    packed: bool = True,
    max_length: int = 256,
    seed: int = 7,
    dtype: torch.dtype = torch.float64,
    distributed_optimizer: bool = False,
    vocabulary: int = VOCABULARY,
    **changes: Any,
) -> list:
    """The model's chunks; `packed=False` builds Megatron-LM's own model, untouched, for a single sample at a time."""
    types: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype}
    if kind == "moe":
        types["moe_router_dtype"] = "fp64" if dtype == torch.float64 else "fp32"
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    config = GPTModelConfig(
        transformer=transformer_config(kind, **{**types, **changes}),
        vocab_size=vocabulary,
        seq_length=max_length,
        position_embedding_type="rope",
    )
    if packed:
        config = with_packed_model(config)
    # Megatron-LM's torch norm ignores params_dtype; DDP hooks hold on to parameters, so convert before it wraps them
    config.pre_wrap_hooks.append(lambda chunks: [chunk.to(dtype) for chunk in chunks])
    return GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=False, use_distributed_optimizer=distributed_optimizer
        ),
        data_parallel_random_init=False,
    )
