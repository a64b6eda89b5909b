"""Attention of an MLA layer from its latents: what is exchanged is up-projected where it is attended to.

Legend: `s` local tokens, `x` tokens of the shared samples, of which this rank holds `x_r`, `h` heads of a
tensor-parallel rank, `c` CP degree; widths `q` of the query latent, `l` of the KV latent, `r` of the rotary key that
all heads share, `d` of a query or key head (`d - r` without rotary part), `dv` of a value head. Key latents are the KV
latent and the rotated rotary key side by side, l + r wide.

Local samples are up-projected here, with all heads, and every use of a weight goes through `sliced`. Recompute
`mla_up_proj` takes all up-projections of a micro-batch as one function, so that the DDP hook of a weight runs once per
micro-batch under every exchange: overlapped gradient reduction counts how often (param_and_grad_buffer.py, 0.19.2).
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from megatron_hbp.errors import ConfigError
from megatron_hbp.model import context as micro_batch
from megatron_hbp.model.exchange import implementation
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.sliced import sliced_linear
from megatron_hbp.model.split import rows_at


class NothingToDiscard:
    """Stands for the checkpoint that MLA's forward expects: the up-projection belongs to a larger recomputed part."""

    def discard_output_and_register_recompute(self, hook_tensor: torch.Tensor) -> None:
        """Nothing has been kept."""


class UpProjection:
    """The up-projections of one MLA layer, for any of its heads and any tokens.

    No module: core attention holds it, and the weights belong to the layer alone.
    """

    def __init__(self, layer: Any):
        config = layer.config
        self.layer, self.config = layer, config
        self.num_heads: int = layer.num_attention_heads_per_partition
        self.qk_width: int = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.rope_width: int = config.qk_pos_emb_head_dim
        self.v_width: int = config.v_head_dim
        self.kv_latent: int = config.kv_lora_rank
        self.of_queries = layer.linear_q_proj if config.q_lora_rank is None else layer.linear_q_up_proj
        self.of_keys_values = layer.linear_kv_up_proj

    def refusal(self) -> str | None:
        """Why this layer cannot be attended to from its latents; None where it can."""
        if any(hasattr(linear, "layer_norm_weight") for linear in (self.of_queries, self.of_keys_values)):
            return (
                "its up-projections carry the latents' norm (Transformer Engine's fused form) and cannot be sliced: "
                "build the model from a config of with_packed_model, or give --transformer-impl local"
            )
        if self.config.fp8 or self.config.fp4:
            return "its up-projections are quantised (--fp8-format, --fp4-format): drop that flag"
        return None

    def attention(self, q_latent: torch.Tensor, kv_latent: torch.Tensor, kernel: Kernel, scale: float) -> list:
        """q_latent [s, q], kv_latent [s, l + r] -> [of the local samples [s - x_r, h, dv],] of the shared [x_r, h, dv].

        Raises:
            ConfigError: the layer's weights cannot be sliced.
        """
        if why := self.refusal():
            raise ConfigError(f"a tier exchanges latents, but layer {self.layer.layer_number} can't: {why}")
        context = micro_batch.current()
        split, shared, group = context.split, context.split.shared, context.cp_group
        assert shared is not None and group is not None
        exchange, weights = implementation(context.tier.exchange), self._weights()
        local = self._local(q_latent, kv_latent)
        gathered = exchange.gather(q_latent, kv_latent, split, group)

        def up(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            gathered, *_, w_q, w_kv = tensors
            return exchange.project(self, gathered, w_q, w_kv, shared, group) + self._project_local(*tensors[1:])

        inputs = (gathered, *local, *weights)
        # recomputed core attention has the up-projection in it, and keeps nothing of it anyway
        if self.layer.recompute_up_proj and not self.layer.checkpoint_core_attention:
            checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
            projected = checkpoint.checkpoint(up, *inputs)
            self.layer.qkv_up_checkpoint = checkpoint  # MLA's forward discards its output after core attention
        else:
            projected = up(*inputs)

        parts = []
        if split.local is not None:
            q, k, v = projected[-3:]
            parts.append(kernel(q, k, v, split.local, scale))
        parts.append(exchange.attend(self, projected, kv_latent, weights[1], kernel, scale, split, group))
        return parts

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two weights, [h d, q] and [h (d - r + dv), l], as the modules would see them.

        The modules are not called, so their forward hooks are: there DDP waits for the parameters that it gathers
        during the forward (overlap_param_gather).
        """
        for linear in (self.of_queries, self.of_keys_values):
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        return self.of_queries.weight, self.of_keys_values.weight

    def _local(self, q_latent: torch.Tensor, kv_latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The latents of the local samples, if there are any."""
        split = micro_batch.current().split
        return () if split.local is None else (rows_at(q_latent, split.local_at), rows_at(kv_latent, split.local_at))

    def _project_local(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """([q_latent, kv_latent,] weights) of the local samples -> q, k, v of all heads, or nothing."""
        if len(tensors) == 2:
            return ()
        context = micro_batch.current()
        q_latent, kv_latent, *weights = tensors
        heads = range(self.num_heads)
        positions = rows_at(context.position_ids, context.split.local_at)
        return self.queries(q_latent, weights[0], heads, positions), *self.keys_values(kv_latent, weights[1], heads)

    def queries(
        self, latents: torch.Tensor, weight: torch.Tensor, heads: range, positions: torch.Tensor
    ) -> torch.Tensor:
        """[n, q] -> the rotated queries of some heads, [n, len(heads), d]."""
        d = self.qk_width
        q = sliced_linear(latents, weight, slice(heads.start * d, heads.stop * d), self.of_queries.weight)
        plain, rotary = q.unflatten(1, (-1, d)).split((d - self.rope_width, self.rope_width), dim=2)
        return torch.cat((plain, self.rotated(rotary, positions)), dim=2)

    def keys_values(
        self, latents: torch.Tensor, weight: torch.Tensor, heads: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, l + r] -> keys [n, len(heads), d] and values [n, len(heads), dv] of some heads."""
        compressed, rope = latents.split((self.kv_latent, self.rope_width), dim=1)
        width = self.qk_width - self.rope_width + self.v_width
        rows = slice(heads.start * width, heads.stop * width)
        kv = sliced_linear(compressed, weight, rows, self.of_keys_values.weight).unflatten(1, (-1, width))
        plain, v = kv.split((width - self.v_width, self.v_width), dim=2)
        # contiguous: a view of kv would keep the storage of k's part alive, and a recomputed v needs one of its own
        return torch.cat((plain, rope[:, None].expand(-1, len(heads), -1)), dim=2), v.contiguous()

    def rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[n, heads, r] rotated by positions [n]."""
        found = self.layer.rotary_pos_emb.at(positions)
        frequencies, mscale = found if isinstance(found, tuple) else (found, 1.0)
        rotated = apply_rotary_pos_emb(
            x[:, None], frequencies, config=self.config, mscale=mscale, cp_group=self.layer.pg_collection.cp,
            mla_rotary_interleaved=True,
        )  # fmt: skip
        return rotated[:, 0]
