"""Between Megatron-LM's flags and the description of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hbp.planning.core.model import AttentionShape, FeedForward, Layer, ModelSpec

DECODER = ("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear")
"""Flags of all decoders of the Llama line."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's models have in common that shapes do not tell."""

    name: str
    flags: tuple[str, ...]
    """Norms, rotary positions, routing."""


def shape_flags(spec: ModelSpec) -> list[str]:
    """The flags that give the shapes of `spec`, as words; the vocabulary is that of the token store."""
    attention = spec.attention
    dense = next((each.feed_forward for _, each in spec.layers if not each.feed_forward.num_experts), None)
    experts = next((each.feed_forward for _, each in spec.layers if each.feed_forward.num_experts), None)
    width = (dense or experts or FeedForward(width=0)).width
    flags: dict[str, Any] = {
        "--num-layers": spec.num_layers,
        "--hidden-size": spec.hidden,
        "--ffn-hidden-size": width,
        "--num-attention-heads": attention.num_query_heads,
    }
    switches = [] if spec.tied_embeddings else ["--untie-embeddings-and-output-weights"]
    if attention.kv_latent:
        switches.append("--multi-latent-attention")
        flags |= {"--q-lora-rank": attention.q_latent} if attention.q_latent != spec.hidden else {}
        flags |= {
            "--kv-lora-rank": attention.kv_latent,
            "--qk-head-dim": attention.qk_width - attention.rope_width,
            "--qk-pos-emb-head-dim": attention.rope_width,
            "--v-head-dim": attention.v_width,
        }
    else:
        switches.append("--group-query-attention")
        flags |= {"--num-query-groups": attention.num_kv_heads, "--kv-channels": attention.qk_width}
    if experts:
        pattern = "+".join(f"[{int(each.feed_forward.num_experts > 0)}]*{count}" for count, each in spec.layers)
        flags |= {
            "--num-experts": experts.num_experts,
            "--moe-layer-freq": f"({pattern})",
            "--moe-ffn-hidden-size": experts.width,
            "--moe-router-topk": experts.experts_per_token,
        }
        if experts.shared_width:
            flags["--moe-shared-expert-intermediate-size"] = experts.shared_width
    return [str(word) for pair in flags.items() for word in pair] + switches


def model_of_args(args: Any) -> ModelSpec:
    """The model that Megatron-LM's parsed arguments describe, all tensor-parallel ranks together."""
    layers: list[tuple[int, Layer]] = []
    for is_moe in _moe_pattern(args):
        layer = Layer(attention=_attention(args), feed_forward=_feed_forward(args, is_moe=is_moe))
        if layers and layers[-1][1] == layer:
            layers[-1] = (layers[-1][0] + 1, layer)
        else:
            layers.append((1, layer))
    return ModelSpec(
        name=f"{args.num_layers}x{args.hidden_size}",
        hidden=args.hidden_size,
        vocabulary=args.padded_vocab_size,
        layers=tuple(layers),
        tied_embeddings=not args.untie_embeddings_and_output_weights,
    )


def _attention(args: Any) -> AttentionShape:
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        return AttentionShape(
            num_query_heads=heads,
            num_kv_heads=heads,
            qk_width=args.qk_head_dim + args.qk_pos_emb_head_dim,
            v_width=args.v_head_dim,
            q_latent=args.q_lora_rank or args.hidden_size,
            kv_latent=args.kv_lora_rank,
            rope_width=args.qk_pos_emb_head_dim,
        )
    width = args.kv_channels or args.hidden_size // heads
    kv_heads = args.num_query_groups if args.group_query_attention else heads
    return AttentionShape(num_query_heads=heads, num_kv_heads=kv_heads, qk_width=width, v_width=width)


def _feed_forward(args: Any, *, is_moe: bool) -> FeedForward:
    matrices = 3 if args.swiglu else 2
    if not is_moe:
        return FeedForward(width=args.ffn_hidden_size, num_matrices=matrices)
    return FeedForward(
        width=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        num_matrices=matrices,
        num_experts=args.num_experts,
        experts_per_token=args.moe_router_topk,
        shared_width=args.moe_shared_expert_intermediate_size or 0,
    )


def _moe_pattern(args: Any) -> Sequence[bool]:
    """Whether each layer has experts."""
    if not args.num_experts:
        return [False] * args.num_layers
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        return [layer % pattern == 0 for layer in range(args.num_layers)]
    return [bool(entry) for entry in pattern]
