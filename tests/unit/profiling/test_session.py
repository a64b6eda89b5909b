"""What a profile says of its model."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hbp.model.recompute import RecomputeSwitch
from megatron_hbp.profiling.options import ProfileOptions
from megatron_hbp.profiling.session import _header
from megatron_hbp.runtime.setup import Runtime


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_model_is_the_same_whatever_the_tensor_parallelism(kv_heads, monkeypatch):
    """At TP 8 each rank has a KV head, where the model has two: they were counted as eight."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=8)
    models = []
    for tp in (1, 2, 8):
        args = SimpleNamespace(
            num_attention_heads=8, group_query_attention=True, num_query_groups=kv_heads, kv_channels=None,
            hidden_size=64, multi_latent_attention=False, tensor_model_parallel_size=tp, num_layers=2, swiglu=True,
            num_experts=None, moe_ffn_hidden_size=None, moe_shared_expert_intermediate_size=None, moe_router_topk=2,
            ffn_hidden_size=96, padded_vocab_size=128, world_size=8, data_parallel_size=8 // tp,
            pipeline_model_parallel_size=1, expert_model_parallel_size=1, params_dtype=torch.float32,
            untie_embeddings_and_output_weights=True,
        )  # fmt: skip
        options = dataclasses.replace(ProfileOptions.from_argv([]).hbp, exchange="a2a")
        model: Any = SimpleNamespace(transformer=config)
        runtime = Runtime(args=args, options=options, model=model, switch=RecomputeSwitch(), notes=())
        models.append(_header(runtime, ProfileOptions.from_argv([])).model)
    assert models[0] == models[1] == models[2]
    assert models[0].attention.num_kv_heads == kv_heads
