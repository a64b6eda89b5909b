"""A model, described once: its layers by kind. FLOPs, parameters and activation bytes are views of the description.

Norms and biases are left out: they are below 0.1% of the parameters of the models here. Bytes are those of bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

AttentionKind = Literal["full", "window", "linear"]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Heads and widths of one attention layer; latent widths are 0 without MLA."""

    num_query_heads: int
    num_kv_heads: int
    qk_width: int
    """Width of a query or key head, rotary part included."""
    v_width: int
    q_latent: int = 0
    """MLA: width of the compressed query; the hidden width where queries are not compressed."""
    kv_latent: int = 0
    """MLA: width of the compressed keys and values."""
    rope_width: int = 0
    """MLA: width of the rotary key that all heads share."""
    kind: AttentionKind = "full"
    """What a query attends to: every key before it, those inside a window, or a recurrent state."""

    def on_tensor_parallel_rank(self, tp: int) -> "AttentionShape":
        """The shape on one of `tp` ranks: heads are divided, latents are on all of them."""
        return replace(self, num_query_heads=self.num_query_heads // tp, num_kv_heads=max(1, self.num_kv_heads // tp))

    def weights(self, hidden: int) -> int:
        """Parameters of the projections, which every token passes."""
        queries, output = self.num_query_heads * self.qk_width, self.num_query_heads * self.v_width
        if not self.kv_latent:
            return hidden * (queries + self.num_kv_heads * (self.qk_width + self.v_width) + output)
        is_compressed = self.q_latent != hidden
        project = self.q_latent * (hidden + queries) if is_compressed else hidden * queries
        project += hidden * (self.kv_latent + self.rope_width)
        keys_values = self.num_query_heads * (self.qk_width - self.rope_width + self.v_width)
        return project + self.kv_latent * keys_values + output * hidden

    @property
    def activations(self) -> int:
        """Elements per token that attention saves: latents, q, k, v and its output."""
        kv_heads = self.num_query_heads if self.kv_latent else self.num_kv_heads
        latents = self.q_latent + self.kv_latent + self.rope_width
        return latents + (self.num_query_heads + kv_heads) * (self.qk_width + self.v_width)

    @property
    def flops_per_square(self) -> float:
        """FLOPs of the forward of causal attention, per squared token."""
        return float(self.num_query_heads * (self.qk_width + self.v_width))


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The MLP of a layer, or its experts."""

    width: int
    """Of the MLP, or of one routed expert."""
    num_matrices: int = 3
    """Gate, up and down; 2 without a gate."""
    num_experts: int = 0
    """Routed experts; 0 for a dense layer."""
    experts_per_token: int = 0
    shared_width: int = 0
    """Of all shared experts together."""

    def weights(self, hidden: int, *, visited: bool) -> int:
        """Parameters: all of them, or those that one token visits."""
        experts = (self.experts_per_token if visited else self.num_experts) if self.num_experts else 1
        matrices = self.num_matrices * hidden * (experts * self.width + self.shared_width)
        return matrices + hidden * self.num_experts

    def routed_weights(self, hidden: int) -> int:
        """Parameters of the routed experts."""
        return self.num_experts * self.num_matrices * hidden * self.width

    def activations(self, hidden: int) -> int:
        """Elements per token saved: gate, up and product; of experts their input too, and the combined output."""
        if not self.num_experts:
            return self.num_matrices * self.width
        return hidden + self.experts_per_token * (hidden + self.num_matrices * self.width) + 3 * self.shared_width


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer."""

    attention: AttentionShape
    feed_forward: FeedForward

    def activations(self, hidden: int) -> int:
        """Elements per token saved when nothing is recomputed; the residual stream and the norms' inputs take four."""
        return 4 * hidden + self.attention.activations + self.feed_forward.activations(hidden)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is made of."""

    name: str
    hidden: int
    vocabulary: int
    """Entries of the embedding, padding included."""
    layers: tuple[tuple[int, Layer], ...]
    """(number, layer) of each run of equal layers, from the first on."""
    tied_embeddings: bool = False

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return sum(count for count, _ in self.layers)

    @property
    def attention(self) -> AttentionShape:
        """Attention of the first layer, which exchanges are priced by."""
        return self.layers[0][1].attention

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(count for count, _ in self._moe())

    @property
    def experts_per_token(self) -> int:
        """Routed experts that a token visits in a layer; 0 for a dense model."""
        return max((layer.feed_forward.experts_per_token for _, layer in self._moe()), default=0)

    @property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.hidden * self.vocabulary * (1 if self.tied_embeddings else 2)
        return embeddings + sum(count * self._weights(layer, visited=False) for count, layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of routed experts, which expert parallelism divides."""
        return sum(count * layer.feed_forward.routed_weights(self.hidden) for count, layer in self._moe())

    @property
    def attention_flops(self) -> float:
        """FLOPs of the forward of causal attention, per squared token, all layers."""
        return sum(count * layer.attention.flops_per_square for count, layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes per token that all layers save when nothing is recomputed."""
        return sum(2 * count * layer.activations(self.hidden) for count, layer in self.layers)

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes per token that the largest layer saves."""
        return max(2 * layer.activations(self.hidden) for _, layer in self.layers)

    def linear_flops(self, supervised: float = 1.0) -> float:
        """FLOPs per token in all GEMMs, forward and backward; logits are made for a share `supervised` of tokens."""
        weights = sum(count * self._weights(layer, visited=True) for count, layer in self.layers)
        return 6.0 * (weights + self.hidden * self.vocabulary * supervised)

    def _weights(self, layer: Layer, *, visited: bool) -> int:
        return layer.attention.weights(self.hidden) + layer.feed_forward.weights(self.hidden, visited=visited)

    def _moe(self) -> Iterator[tuple[int, Layer]]:
        return ((count, layer) for count, layer in self.layers if layer.feed_forward.num_experts)


def dense_model(
    name: str, *, num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, width: int, vocabulary: int
) -> ModelSpec:
    """A Llama-style model: grouped-query attention, gated MLP of `width`, untied embeddings."""
    head = hidden // num_heads
    attention = AttentionShape(num_query_heads=num_heads, num_kv_heads=num_kv_heads, qk_width=head, v_width=head)
    layer = Layer(attention=attention, feed_forward=FeedForward(width=width))
    return ModelSpec(name=name, hidden=hidden, vocabulary=vocabulary, layers=((num_layers, layer),))
