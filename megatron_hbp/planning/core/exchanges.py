"""What the ranks of a context-parallel group exchange in attention: one row per exchange.

Legend: `c` CP degree, `h` query heads, `k` KV heads, `d` width of a query or key head, `dv` of a value head, all of one
tensor-parallel rank. Elements received per local token in the forward of one layer:

    a2a         (h (d + dv) + m (d + dv)) (c - 1) / c   heads for sequence (Ulysses); m = lcm(k, c) KV heads
    all_gather  k (d + dv) (c - 1)                      keys and values of the others; causal work needs zigzag
    p2p         k (d + dv) (c - 1)                      the same in a ring, hidden under attention
    qkv_latent  (q + l + r) (c - 1) + h dv (c - 1) / c  MLA: latents q, l and rope keys r; own heads are up-projected
    kv_latent   (l + r) (c - 1)                         MLA: ring of latents; remote keys are up-projected again

The backward of a2a, all_gather and qkv_latent sends as many back. Rings pass the keys once more, and with them their
gradients in fp32: three times the forward's bytes under bf16. The names are Transformer Engine's (`cp_comm_type`) where
it has the exchange. The run time of exchange NAME is `megatron_hbp/model/exchange/NAME.py`; nothing else names one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_hbp.planning.core.model import AttentionShape

AUTO: Literal["auto"] = "auto"
"""A tier that leaves the choice to the run; cost models price it as `planned` says."""

_Count = Callable[[AttentionShape, int], float]


def _nothing(shape: AttentionShape, cp_degree: int) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Traits of one exchange."""

    name: str
    elements: _Count
    """Elements that a rank receives per local token in the forward of one layer."""
    extra_flops: _Count = _nothing
    """FLOPs per local token in the forward of one layer that CP degree 1 does not have."""
    backward_bytes: float = 1.0
    """Bytes received in the backward over those of the forward, under half precision."""
    splits_heads: bool = False
    """Ranks get whole heads, so the CP degree must divide them."""
    needs_latents: bool = False
    """For multi-latent attention only."""
    zigzag: bool = False
    """A rank attends from its own queries: mirrored slices balance the causal work."""
    is_ring: bool = False
    """Transfers hide under attention, whose partial results are merged."""

    def refusal(self, shape: AttentionShape, cp_degree: int) -> str | None:
        """Why it cannot be used with this shape and degree; None where it can."""
        if self.splits_heads and shape.num_query_heads % cp_degree:
            return f"CP degree {cp_degree} does not divide the {shape.num_query_heads} query heads of a rank"
        if self.needs_latents and not shape.kv_latent:
            return "the model has no latent attention (MLA)"
        return None


def _heads(shape: AttentionShape, c: int) -> float:
    kv_heads = math.lcm(shape.num_kv_heads, c)
    return (shape.num_query_heads + kv_heads) * (shape.qk_width + shape.v_width) * (c - 1) / c


def _keys_values(shape: AttentionShape, c: int) -> float:
    return float(shape.num_kv_heads * (shape.qk_width + shape.v_width) * (c - 1))


def _all_latents(shape: AttentionShape, c: int) -> float:
    latents = shape.q_latent + shape.kv_latent + shape.rope_width
    return latents * (c - 1) + shape.num_query_heads * shape.v_width * (c - 1) / c


def _kv_latents(shape: AttentionShape, c: int) -> float:
    return float((shape.kv_latent + shape.rope_width) * (c - 1))


def _up_projection(shape: AttentionShape, c: int) -> float:
    keys_values = shape.num_query_heads * (shape.qk_width - shape.rope_width + shape.v_width)
    return 2.0 * shape.kv_latent * keys_values * (c - 1)


EXCHANGES: dict[str, Exchange] = {
    each.name: each
    for each in (
        Exchange(name="a2a", elements=_heads, splits_heads=True),
        Exchange(name="all_gather", elements=_keys_values, zigzag=True),
        Exchange(name="p2p", elements=_keys_values, backward_bytes=3.0, zigzag=True, is_ring=True),
        Exchange(name="qkv_latent", elements=_all_latents, splits_heads=True, needs_latents=True),
        Exchange(
            name="kv_latent", elements=_kv_latents, extra_flops=_up_projection, backward_bytes=3.0, needs_latents=True,
            zigzag=True, is_ring=True,
        ),
    )
}  # fmt: skip
"""By name, in the order in which equals are preferred."""


def usable(shape: AttentionShape, cp_degree: int) -> list[Exchange]:
    """The exchanges that this shape and degree allow; `all_gather` and `p2p` always do."""
    return [each for each in EXCHANGES.values() if each.refusal(shape, cp_degree) is None]


def planned(name: str, shape: AttentionShape, cp_degree: int) -> Exchange:
    """The exchange that a tier's cost is modelled with: the named one; for `auto` the first that can be used.

    That is `a2a` where the heads allow it: the choice of the run is never worse.
    """
    return usable(shape, cp_degree)[0] if name == AUTO else EXCHANGES[name]
