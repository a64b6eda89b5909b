"""Core attention of every layer, in place of Megatron-LM's: exchange, varlen kernel, exchange back.

Takes the place of `core_attention` in the layer specs (hook 3 of the design), so Megatron-LM's attention classes, GQA
and MLA, stay as they are. Megatron-LM's layout: q [s, 1, h, d], k and v [s, 1, k, d], output [s, 1, h * dv].
"""

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hbp.errors import ConfigError
from megatron_hbp.model import context as micro_batch
from megatron_hbp.model import kernels
from megatron_hbp.model.exchange import heads, keys, ring

EXCHANGES = {
    "a2a": heads.shared_attention,
    "all_gather": keys.shared_attention,
    "p2p": ring.shared_attention,
}


class PackedCoreAttention(MegatronModule):
    """Causal attention inside each sample of a pack, under the CP group of the current micro-batch."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        """The signature of Megatron-LM's core attentions; mask type and communication type are ours to decide."""
        super().__init__(config=config)
        if config.attention_dropout if attention_dropout is None else attention_dropout:
            raise ConfigError("attention dropout is not supported with packed samples: give --attention-dropout 0")
        if config.window_size is not None:
            raise ConfigError("sliding-window attention is not supported with --hbp-plan: drop --window-size")
        if config.softmax_type != "vanilla":
            raise ConfigError(f"--softmax-type {config.softmax_type} is not supported with --hbp-plan: use vanilla")
        self.layer_number = layer_number
        default_scale = 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.softmax_scale = default_scale if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= max(1, layer_number)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[s, 1, h, d], [s, 1, k, d], [s, 1, k, dv] -> [s, 1, h * dv]."""
        context = micro_batch.current()
        split = context.split
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        kernel = kernels.choose(context.kernel, q.device, q.dtype)

        parts = []
        if split.home is not None:
            q_home, k_home, v_home = (_rows(x, split.home_at) for x in (q, k, v))
            parts.append(kernel(q_home, k_home, v_home, split.home, self.softmax_scale))
        if split.shared is not None:
            assert context.cp_group is not None
            q_here, k_here, v_here = (_rows(x, split.shared_at) for x in (q, k, v))
            shared_attention = EXCHANGES[context.exchange]
            parts.append(
                shared_attention(q_here, k_here, v_here, split.shared, context.cp_group, kernel, self.softmax_scale)
            )
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return _rows(out, split.back).reshape(out.shape[0], 1, -1)


def _rows(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    return x if at is None else x.index_select(0, at)
