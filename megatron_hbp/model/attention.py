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
from megatron_hbp.model.exchange import implementation
from megatron_hbp.model.latents import UpProjection
from megatron_hbp.model.split import rows_at
from megatron_hbp.planning.core.exchanges import EXCHANGES


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
        self.up_projection: UpProjection | None = None  # MLA's layer sets it
        default_scale = 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.softmax_scale = default_scale if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= max(1, layer_number)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[s, 1, h, d], [s, 1, k, d], [s, 1, k, dv] -> [s, 1, h * dv]; without a value from MLA's latents."""
        context = micro_batch.current()
        kernel = kernels.select(context.tier.kernel, query.device, query.dtype)
        if value is None:
            assert self.up_projection is not None
            parts = self.up_projection.attention(query.squeeze(1), key.squeeze(1), kernel, self.softmax_scale)
        else:
            parts = self._attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), kernel)
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return rows_at(out, context.split.back).reshape(out.shape[0], 1, -1)

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: kernels.Kernel) -> list:
        """[s, h, d], [s, k, d], [s, k, dv] -> [of the local samples,] [of the shared ones] [.., h, dv]."""
        context = micro_batch.current()
        split = context.split
        parts, finish = [], None
        if split.shared is not None:
            assert context.cp_group is not None
            name = context.tier.exchange
            if EXCHANGES[name].needs_latents:
                raise ConfigError(f"exchange={name} requires latent attention: give MLA, or another exchange")
            q_here, k_here, v_here = (rows_at(x, split.shared_at) for x in (q, k, v))
            # started first: the rows are on their way while this rank attends to its local samples
            finish = implementation(name).start(q_here, k_here, v_here, split.shared, context.cp_group)
        if split.local is not None:
            q_local, k_local, v_local = (rows_at(x, split.local_at) for x in (q, k, v))
            parts.append(kernel(q_local, k_local, v_local, split.local, self.softmax_scale))
        if finish is not None:
            parts.append(finish(kernel, self.softmax_scale))
        return parts
