"""The model: Megatron-LM's GPT layer specs with our core attention, norm and rotary in their places.

Nothing of GPTModel, attention or MoE is copied or subclassed, of MLA two methods are (mla.py); a spec says which class
builds which part.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models import GPTModelConfig

from megatron_hbp.errors import ConfigError
from megatron_hbp.model.attention import PackedCoreAttention
from megatron_hbp.model.mla import PackedMLASelfAttention
from megatron_hbp.model.norm import SequenceParallelRMSNorm
from megatron_hbp.model.rotary import localise
from megatron_hbp.model.router import PackedRouter


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's spec, dense or MoE, GQA or MLA, local or Transformer Engine.

    Goes into GPTModelConfig.transformer_layer_spec. The norms of MLA's latents stay out of the layers that up-project
    them (Transformer Engine fuses the two), so that latents can be exchanged. A checkpoint then has
    `kv_layernorm.weight` where a fused one has `linear_kv_up_proj.layer_norm_weight`, likewise for queries; always, not
    only where a tier exchanges latents, so that checkpoints do not depend on exchanges.
    """
    transformer = config.transformer
    spec = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    swap: dict[Any, Any] = {
        DotProductAttention: PackedCoreAttention,
        MLASelfAttention: PackedMLASelfAttention,
        TopKRouter: PackedRouter,
    }
    if transformer.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        swap[TEDotProductAttention] = PackedCoreAttention
        if transformer.multi_latent_attention and transformer.qk_layernorm:
            from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

            spec = unfused(spec, TESpecProvider(), rms_norm=transformer.normalization == "RMSNorm")
    if transformer.normalization == "RMSNorm":
        swap[WrappedTorchNorm] = SequenceParallelRMSNorm
    spec = _replaced(spec, swap)
    if not any(_contains(layer, PackedCoreAttention) for layer in spec.layer_specs):
        raise ConfigError("the layer spec of this model has no core attention that --hbp-plan knows: drop --spec")
    return spec


def with_packed_model(config: GPTModelConfig) -> GPTModelConfig:
    """`config` set up so that the models built from it work on packs."""
    if config.transformer.multi_latent_attention:
        # its fused kernels rotate token i by row i of a table that the YaRN module keeps, and exist for YaRN only; that
        # of grouped-query attention rotates by the frequencies it is handed, which are those of the local positions
        config.transformer.apply_rope_fusion = False
    config.transformer_layer_spec = layer_spec
    config.pre_wrap_hooks.append(_localise_rotary)
    return config


def why_no_latents(transformer: Any) -> str | None:
    """Why a model cannot exchange latents, and what to do; None where it can."""
    if not transformer.multi_latent_attention:
        return "the model has no latents: give --multi-latent-attention"
    if transformer.fp8 or transformer.fp4:
        return "it slices weights, and quantised ones cannot be: drop --fp8-format, --fp4-format"
    if getattr(transformer, "mla_down_proj_fusion", False):
        return "fused down-projections do not hand out latents: drop --mla-down-proj-fusion"
    return None


def unfused(spec: Any, backend: Any, *, rms_norm: bool) -> Any:
    """`spec` with norms and up-projections of MLA's latents as modules of their own, from a Megatron-LM backend."""
    fused, plain = backend.column_parallel_layer_norm_linear(), backend.column_parallel_linear()
    norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True)

    def separate(part: Any) -> Any:
        if not isinstance(part, MLASelfAttentionSubmodules):
            return part
        changes = {
            name: value
            for up, of in (("linear_q_up_proj", "q_layernorm"), ("linear_kv_up_proj", "kv_layernorm"))
            if getattr(part, up) is fused
            for name, value in ((up, plain), (of, norm))
        }
        return dataclasses.replace(part, **changes)

    return _replaced(spec, {}, separate)


def _localise_rotary(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    if not sum(localise(chunk) for chunk in chunks):
        raise ConfigError("--hbp-plan needs rotary positions: give --position-embedding-type rope")
    return chunks


def _replaced(value: Any, swap: dict[Any, Any], change: Callable[[Any], Any] = lambda part: part) -> Any:
    """A copy of a spec (nested dataclasses and lists) with every class of `swap` replaced, every dataclass changed."""
    if isinstance(value, type):
        return swap.get(value, value)
    if isinstance(value, list):
        return [_replaced(item, swap, change) for item in value]
    if isinstance(value, functools.partial):
        keywords = {name: _replaced(part, swap, change) for name, part in value.keywords.items()}
        return functools.partial(_replaced(value.func, swap, change), *value.args, **keywords)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _replaced(getattr(value, f.name), swap, change) for f in dataclasses.fields(value) if f.init}
        make: Any = type(value)
        return change(make(**fields))
    return value


def _contains(value: Any, part: type) -> bool:
    if value is part:
        return True
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    return any(_contains(getattr(value, f.name), part) for f in dataclasses.fields(value))
