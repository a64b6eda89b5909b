"""Models against their published sizes, and FLOPs and bytes by hand."""

import pytest

from megatron_hbp.planning.core.model import AttentionShape, FeedForward, Layer, ModelSpec, dense_model
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2, LLAMA_8B, LLAMA_70B, QWEN_32B

# Hidden width x norms, and Qwen's biases of q, k and v: what a ModelSpec leaves out.
LEFT_OUT = {
    "llama3.1-8b": (2 * 32 + 1) * 4096,
    "llama3.1-70b": (2 * 80 + 1) * 8192,
    "qwen2.5-32b": (2 * 64 + 1) * 5120 + 64 * (5120 + 2 * 1024),
    "deepseek-v2": (2 * 60 + 1) * 5120 + 60 * (1536 + 512),
}


@pytest.mark.parametrize(
    ("spec", "published"),
    [
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        (QWEN_32B, 32_763_876_352),
        (DEEPSEEK_V2, 235_741_434_880),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameters_are_the_published_ones(spec, published):
    assert spec.parameters + LEFT_OUT[spec.name] == published


def test_flops_of_llama_8b_by_hand():
    attention, mlp = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336
    head = 4096 * 128256
    assert LLAMA_8B.linear_flops() == 6 * (32 * (attention + mlp) + head)
    assert LLAMA_8B.linear_flops(0.25) == 6 * (32 * (attention + mlp) + head / 4)
    assert LLAMA_8B.attention_flops == 2 * 4096 * 32  # half of q k^T and p v: 2 * 2 * hidden / 2
    assert LLAMA_8B.num_moe_layers == LLAMA_8B.expert_parameters == LLAMA_8B.experts_per_token == 0


def test_flops_of_deepseek_v2_by_hand():
    attention = 5120 * 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 * 128 * 256 + 128 * 128 * 5120
    dense, expert, shared, router = 3 * 5120 * 12288, 3 * 5120 * 1536, 3 * 5120 * 3072, 5120 * 160
    visited = 60 * attention + dense + 59 * (6 * expert + shared + router) + 5120 * 102400
    assert DEEPSEEK_V2.linear_flops() == 6 * visited
    assert visited == pytest.approx(21e9, rel=0.02)  # as published, with the embedding
    assert DEEPSEEK_V2.attention_flops == 60 * 128 * (192 + 128)
    assert (DEEPSEEK_V2.num_layers, DEEPSEEK_V2.num_moe_layers, DEEPSEEK_V2.experts_per_token) == (60, 59, 6)
    assert DEEPSEEK_V2.expert_parameters == 59 * 160 * expert


def test_activations_by_hand():
    """Two norms' and two residuals' inputs, q, k, v and attention's output, gate, up and product; bf16."""
    layer = 2 * (4 * 4096 + (4096 + 1024 + 1024 + 4096) + 3 * 14336)
    assert (LLAMA_8B.largest_layer_bytes, LLAMA_8B.activation_bytes) == (layer, 32 * layer)
    latents = 1536 + 512 + 64
    mla = 4 * 5120 + latents + 2 * 128 * (192 + 128)
    experts = 5120 + 6 * (5120 + 3 * 1536) + 3 * 3072
    assert DEEPSEEK_V2.largest_layer_bytes == 2 * (mla + experts)
    assert DEEPSEEK_V2.activation_bytes == 2 * (60 * mla + 3 * 12288 + 59 * experts)


def test_a_query_that_is_not_compressed_is_projected_at_once():
    shape = AttentionShape(
        num_query_heads=16, num_kv_heads=16, qk_width=192, v_width=128, q_latent=2048, kv_latent=512, rope_width=64
    )
    assert shape.weights(2048) == 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048  # V2-Lite


def test_heads_are_divided_over_tensor_parallel_ranks_and_never_below_one():
    eight = LLAMA_8B.attention.on_tensor_parallel_rank(8)
    assert (eight.num_query_heads, eight.num_kv_heads, eight.qk_width) == (4, 1, 128)
    assert LLAMA_8B.attention.on_tensor_parallel_rank(16).num_kv_heads == 1
    assert DEEPSEEK_V2.attention.on_tensor_parallel_rank(8).kv_latent == 512


def test_two_matrices_without_a_gate_and_tied_embeddings():
    attention = AttentionShape(num_query_heads=2, num_kv_heads=2, qk_width=4, v_width=4)
    layer = Layer(attention=attention, feed_forward=FeedForward(width=32, num_matrices=2))
    tied = ModelSpec(name="x", hidden=8, vocabulary=100, layers=((3, layer),), tied_embeddings=True)
    assert tied.parameters == 3 * (4 * 8 * 8 + 2 * 8 * 32) + 8 * 100
    assert tied.linear_flops() == 6 * tied.parameters
    untied = dense_model("y", num_layers=3, hidden=8, num_heads=2, num_kv_heads=2, width=32, vocabulary=100)
    assert untied.parameters == 3 * (4 * 8 * 8 + 3 * 8 * 32) + 2 * 8 * 100
