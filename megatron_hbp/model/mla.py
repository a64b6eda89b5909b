"""MLA that can hand its latents to core attention, and whose rotary key keeps its gradient under tensor parallelism.

Takes the place of Megatron-LM's MLASelfAttention in the layer specs. Where heads, or keys and values, are exchanged it
is Megatron-LM's, but for the down-projection of keys and values: in 0.19.2 the rotary key, which all heads of all
tensor-parallel ranks share, loses the gradient of the other ranks' heads. The local spec's column-parallel layer
gathers it by gather_from_tensor_model_parallel_region, whose backward hands each rank its columns of its *own* gradient
and adds up nothing; Transformer Engine's duplicated layer is right under sequence parallelism only. Without sequence
parallelism the gradient of the query latents' norm would count TP times, see `PackedMLASelfAttention`.
"""

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.typed_torch import apply_module

from megatron_hbp.model import context as micro_batch
from megatron_hbp.model.latents import NothingToDiscard, UpProjection
from megatron_hbp.planning.core.exchanges import EXCHANGES


class PackedMLASelfAttention(MLASelfAttention):
    """Multi-latent attention on packs, under the exchange of the current micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Megatron-LM's signature."""
        super().__init__(*args, **kwargs)
        self.core_attention.up_projection = UpProjection(self)
        tp = self.tp_group.size()
        if tp > 1 and self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            # finalize_model_grads adds up every "q_layernorm" over tensor-parallel ranks (:453 in 0.19.2): right for a
            # norm of local heads, while this one's gradient is whole on each rank
            for parameter in self.q_layernorm.parameters():
                parameter.register_hook(lambda grad: grad / tp)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Classes of norms and projections; queries without a latent (DeepSeek-V2-Lite) get no norm.

        --qk-layernorm norms latents. Where queries have none, megatron-core 0.19.2 norms the *hidden states* once more
        before the query projection (Transformer Engine), or refuses to build (local spec). So its resolver is asked as
        if queries had a latent, and settles keys and values alone: what it says of the query's latent is not built.
        """
        if self.config.q_lora_rank is not None or not self.config.qk_layernorm:
            return super()._resolve_qk_norm_config(submodules)
        with_latent = copy.copy(self.config)
        with_latent.q_lora_rank = self.config.kv_lora_rank
        classes = QKNormConfigResolver(with_latent, submodules).resolve()
        return {**classes, "linear_q_proj": submodules.linear_q_proj, "q_layernorm": IdentityOp}

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s or s/TP, 1, hidden] -> query, key, value, and the latents of queries and of keys and values.

        Query, key and value are latents, [s, 1, q], [s, 1, l + r] and None (model/latents.py), where samples of the
        micro-batch are shared by an exchange of latents; otherwise Megatron-LM's.
        """
        context = micro_batch.current()
        if context.split.shared is None or not EXCHANGES[context.tier.exchange].needs_latents:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if self.recompute_up_proj:
            self.qkv_up_checkpoint = NothingToDiscard()  # core attention puts its own here
        q_latent, kv_combined = self._down_projection(hidden_states)
        kv_latent, rope = kv_combined.split((self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim), dim=-1)
        if self.config.q_lora_rank is not None:
            q_latent = apply_module(self.q_layernorm)(q_latent)
        kv_latent = apply_module(self.kv_layernorm)(kv_latent)
        widths = [part.shape[-1] for part in (q_latent, kv_latent, rope)]
        latents = torch.cat((q_latent, kv_latent, rope), dim=-1)
        # local heads only from here on: the backward adds up the gradients of all tensor-parallel ranks
        if self.config.sequence_parallel:
            latents = gather_from_sequence_parallel_region(latents, group=self.tp_group)
        else:
            latents = copy_to_tensor_model_parallel_region(latents, group=self.tp_group)
        q_latent, kv_latent, rope = latents.split(widths, dim=-1)  # [s, 1, ...]
        rope = self.core_attention.up_projection.rotated(rope, context.position_ids)
        return q_latent, torch.cat((kv_latent, rope), dim=-1), None, q_latent, kv_latent

    def _down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query latents (hidden states where they are not compressed) and [KV latent, rotary key], columns whole.

        [s/TP, 1, ...] under sequence parallelism, else [s, 1, ...].
        """
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if kv_combined.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined, group=self.tp_group)
            if self.config.sequence_parallel:
                kv_combined = scatter_to_sequence_parallel_region(kv_combined, group=self.tp_group)
        return q_compressed, kv_combined

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron-LM's, with whole columns, so that the rotary key takes the path on which its gradients add up.

        Under sequence parallelism Megatron-LM gathers a rotary key of s/TP tokens with a reduce-scatter in the
        backward. Without, nothing follows: the sum over tensor-parallel ranks is put in here.
        """
        q_compressed, kv_combined = self._down_projection(hidden_states)
        if self.tp_group.size() > 1 and not self.config.sequence_parallel:
            kv_latent, rope = kv_combined.split((self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim), dim=-1)
            rope = copy_to_tensor_model_parallel_region(rope, group=self.tp_group)
            kv_combined = torch.cat((kv_latent, rope), dim=-1)
        return q_compressed, kv_combined
