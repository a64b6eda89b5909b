"""The model: Megatron-LM's GPT layer specs with our core attention, norm and rotary in their places.

Nothing of GPTModel, attention, MLA or MoE is copied or subclassed; a spec says which class builds which part.
"""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
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

    Goes into GPTModelConfig.transformer_layer_spec.
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
    if transformer.normalization == "RMSNorm":
        swap[WrappedTorchNorm] = SequenceParallelRMSNorm
    spec = _replaced(spec, swap)
    if not any(_contains(layer, PackedCoreAttention) for layer in spec.layer_specs):
        raise ConfigError("the layer spec of this model has no core attention that --hbp-plan knows: drop --spec")
    return spec


def with_packed_model(config: GPTModelConfig) -> GPTModelConfig:
    """`config` set up so that the models built from it work on packs."""
    config.transformer_layer_spec = layer_spec
    config.pre_wrap_hooks.append(_localise_rotary)
    return config


def _localise_rotary(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    if not sum(localise(chunk) for chunk in chunks):
        raise ConfigError("--hbp-plan needs rotary positions: give --position-embedding-type rope")
    return chunks


def _replaced(value: Any, swap: dict[Any, Any]) -> Any:
    """A copy of a spec (nested dataclasses and lists) in which every class of `swap` has been replaced."""
    if isinstance(value, type):
        return swap.get(value, value)
    if isinstance(value, list):
        return [_replaced(item, swap) for item in value]
    if isinstance(value, functools.partial):
        keywords = {name: _replaced(part, swap) for name, part in value.keywords.items()}
        return functools.partial(_replaced(value.func, swap), *value.args, **keywords)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _replaced(getattr(value, f.name), swap) for f in dataclasses.fields(value) if f.init}
        make: Any = type(value)
        return make(**fields)
    return value


def _contains(value: Any, part: type) -> bool:
    if value is part:
        return True
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    return any(_contains(getattr(value, f.name), part) for f in dataclasses.fields(value))
