"""DeepSeek-V2-Lite's attention: no norm where its queries have no latent."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer import mla_qk_norm_config
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.models import GPTModelConfig

from megatron_hbp.model.mla import PackedMLASelfAttention
from megatron_hbp.model.spec import layer_spec


class Plain:
    """A linear layer."""


class Fused:
    """A norm and a linear layer in one."""


class Norm:
    """A norm."""


def resolved(kind: type, monkeypatch: pytest.MonkeyPatch, norm: type) -> dict:
    """What `kind` of attention makes of the parts of a spec: Transformer Engine's where `norm` is the identity."""
    has_fused = norm is IdentityOp
    backend = SimpleNamespace(
        layer_norm=lambda **kwargs: Norm, column_parallel_linear=lambda: Plain,
        column_parallel_layer_norm_linear=lambda: Fused if has_fused else None,
    )  # fmt: skip
    monkeypatch.setattr(mla_qk_norm_config, "get_backend", lambda name: backend)
    parts = MLASelfAttentionSubmodules(
        linear_q_proj=Plain, linear_q_up_proj=Plain, linear_kv_up_proj=Fused if has_fused else Plain,
        linear_proj=Plain, q_layernorm=norm, kv_layernorm=norm,
    )  # fmt: skip
    attention: Any = object.__new__(kind)
    torch.nn.Module.__init__(attention)
    attention.config = SimpleNamespace(
        q_lora_rank=None, kv_lora_rank=16, qk_layernorm=True, qk_l2_norm=False, normalization="RMSNorm",
        transformer_impl="any", experimental_attention_variant=None,
    )  # fmt: skip
    return attention._resolve_qk_norm_config(parts)


def test_megatron_norms_the_queries_or_refuses(monkeypatch):
    """What the subclass is for; when this fails, a release has mended it."""
    assert resolved(MLASelfAttention, monkeypatch, IdentityOp)["linear_q_proj"] is Fused
    with pytest.raises(ValueError, match="q_lora_rank is None"):
        resolved(MLASelfAttention, monkeypatch, Norm)


def test_ours_norms_keys_and_values_only(monkeypatch):
    fused = resolved(PackedMLASelfAttention, monkeypatch, IdentityOp)
    apart = resolved(PackedMLASelfAttention, monkeypatch, Norm)

    assert fused["linear_q_proj"] is Plain and fused["linear_kv_up_proj"] is Fused
    assert apart["linear_q_proj"] is Plain and apart["kv_layernorm"] is Norm
    assert fused["q_layernorm"] is IdentityOp and apart["q_layernorm"] is IdentityOp


@pytest.mark.parametrize("rank, norm", [(None, True), (24, True), (None, False)])
def test_the_spec_takes_it(monkeypatch, rank, norm):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    transformer = MLATransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, q_lora_rank=rank, qk_layernorm=norm,
        normalization="RMSNorm", transformer_impl="local", attention_dropout=0.0, hidden_dropout=0.0, rope_type="rope",
    )  # fmt: skip
    (layer,) = layer_spec(GPTModelConfig(transformer=transformer, vocab_size=64, seq_length=32)).layer_specs
    parts = layer.submodules if hasattr(layer, "submodules") else layer
    assert parts.self_attention.module is PackedMLASelfAttention
