"""What the ranks of a context-parallel group exchange in attention, and which exchange costs least.

Legend: `c` CP degree, `h` query heads, `k` KV heads, `d` width of a query or key head, `dv` of a value head, all of one
tensor-parallel rank. Elements received per local token in the forward of one layer:

    a2a         (h (d + dv) + m (d + dv)) (c - 1) / c   heads for sequence (Ulysses); m = lcm(k, c) KV heads
    all_gather  k (d + dv) (c - 1)                      keys and values of the others; causal work wants zigzag
    p2p         k (d + dv) (c - 1)                      the same in a ring, hidden under attention
    qkv_latent  (q + l + r) (c - 1) + h dv (c - 1) / c  MLA: latents q, l and rope keys r; own heads are up-projected
    kv_latent   (l + r) (c - 1)                         MLA: ring of latents; remote keys are up-projected again

The backward of a2a, all_gather and qkv_latent sends as many back. Rings pass the keys once more, and with them their
gradients in fp32: three times the forward's bytes under bf16. The names are Transformer Engine's (`cp_comm_type`) where
it has the exchange.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Exchange = Literal["a2a", "all_gather", "p2p", "qkv_latent", "kv_latent"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
AUTO: Literal["auto"] = "auto"
"""A tier that leaves the choice to the run; it is planned as `a2a`, which the choice is never worse than."""
ZIGZAG: frozenset[str] = frozenset({"all_gather", "p2p", "kv_latent"})
"""Exchanges in which a rank attends from its own queries: mirrored slices balance the causal work."""


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

    def on_tensor_parallel_rank(self, tp: int) -> "AttentionShape":
        """The shape that one of `tp` ranks has; latents are on all of them."""
        return replace(self, num_query_heads=self.num_query_heads // tp, num_kv_heads=max(1, self.num_kv_heads // tp))


def refusal(exchange: Exchange, shape: AttentionShape, cp_degree: int) -> str | None:
    """Why `exchange` cannot be used with this shape and degree; None where it can."""
    if exchange in ("a2a", "qkv_latent") and shape.num_query_heads % cp_degree:
        return f"CP degree {cp_degree} does not divide the {shape.num_query_heads} query heads of a rank"
    if exchange in ("qkv_latent", "kv_latent") and not shape.kv_latent:
        return "the model has no latent attention (MLA)"
    return None


def elements(exchange: Exchange, shape: AttentionShape, cp_degree: int) -> float:
    """Elements a rank receives per local token in the forward of one layer."""
    c, width = cp_degree, shape.qk_width + shape.v_width
    if exchange == "a2a":
        kv_heads = math.lcm(shape.num_kv_heads, c)
        return (shape.num_query_heads + kv_heads) * width * (c - 1) / c
    if exchange in ("all_gather", "p2p"):
        return float(shape.num_kv_heads * width * (c - 1))
    latents = shape.kv_latent + shape.rope_width
    if exchange == "qkv_latent":
        out = shape.num_query_heads * shape.v_width * (c - 1) / c
        return (shape.q_latent + latents) * (c - 1) + out
    return float(latents * (c - 1))


def extra_flops(exchange: Exchange, shape: AttentionShape, cp_degree: int) -> float:
    """FLOPs per local token in the forward of one layer that CP degree 1 does not have: keys up-projected again."""
    if exchange != "kv_latent":
        return 0.0
    up = shape.kv_latent * shape.num_query_heads * (shape.qk_width - shape.rope_width + shape.v_width)
    return 2.0 * up * (cp_degree - 1)


def backward_bytes(exchange: Exchange) -> float:
    """What the backward receives, over the forward's bytes, under half precision."""
    return 3.0 if exchange in ("p2p", "kv_latent") else 1.0


def outside_share(cp_degree: int, node_size: int) -> float:
    """Share of what a rank receives that comes from other nodes; gangs are aligned to their degree."""
    in_node = math.gcd(cp_degree, node_size) if cp_degree > node_size else cp_degree
    return (cp_degree - in_node) / max(1, cp_degree - 1)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds that an exchange is priced with; the defaults are those of an H100 cluster (planning/cost.py)."""

    node_size: int = 8
    """Data-parallel ranks in a node."""
    node_bandwidth: float = 129e9
    """Bytes/s that a rank receives inside a node."""
    cluster_bandwidth: float = 45e9
    """Bytes/s that a rank receives across nodes."""
    linear_rate: float = 515e12
    """FLOP/s in GEMMs."""
    attention_rate: float = 308e12
    """FLOP/s in attention."""

    memory_bandwidth: float = 3e12
    """Bytes/s of device memory."""
    overlap: float = 0.8
    """Share of a ring's transfer that attention can hide: its copies take some of the same cores and memory."""

    def bandwidth(self, cp_degree: int) -> float:
        """Bytes/s of a group of `cp_degree`: its slowest link decides."""
        return self.node_bandwidth if cp_degree <= self.node_size else self.cluster_bandwidth


@dataclass(frozen=True, kw_only=True)
class Price:
    """Seconds of one exchange in the forward and backward of one layer, for all tokens of a rank."""

    exchange: Exchange
    transfer: float
    """Seconds on the links."""
    hidden: float
    """Seconds of it under attention (rings)."""
    extra: float
    """Seconds that CP degree 1 does not have: keys up-projected again, partial results of a ring merged."""

    @property
    def seconds(self) -> float:
        """Seconds that a layer gets longer by."""
        return self.transfer - self.hidden + self.extra


def price(
    exchange: Exchange,
    shape: AttentionShape,
    *,
    cp_degree: int,
    tokens: int,
    squares: float,
    machine: Machine,
) -> Price:
    """Price of `exchange`, in bf16, for a pack of `tokens` whose samples' squared lengths sum to `squares`."""
    c, local = cp_degree, tokens / cp_degree
    forward_bytes = 2 * elements(exchange, shape, c) * local
    transfer = forward_bytes * (1 + backward_bytes(exchange)) / machine.bandwidth(c)
    # up-projected in the forward and once more in the backward, whose two GEMMs come on top
    extra = 4 * extra_flops(exchange, shape, c) * local / machine.linear_rate
    hidden = 0.0
    if exchange in ("p2p", "kv_latent"):
        flops = 3.5 * shape.num_query_heads * (shape.qk_width + shape.v_width) * squares / c
        hidden = machine.overlap * min(transfer, flops / machine.attention_rate * (c - 1) / c)
        # each of the c - 1 further steps reads and writes an fp32 sum and reads its own share: of the output in the
        # forward, of the queries' gradient in the backward
        widths = shape.qk_width + shape.v_width
        extra += (c - 1) * local * shape.num_query_heads * widths * 12 / machine.memory_bandwidth
    return Price(exchange=exchange, transfer=transfer, hidden=hidden, extra=extra)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The exchange of a tier, and every price it was compared by."""

    exchange: Exchange
    prices: tuple[Price, ...]
    """Of all exchanges that can be used, cheapest first."""
    refused: tuple[tuple[Exchange, str], ...]

    @property
    def reason(self) -> str:
        """One line for the log."""
        found = ", ".join(f"{p.exchange} {p.seconds * 1e3:.3g} ms" for p in self.prices)
        dropped = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.exchange} (exposed a layer: {found}{dropped})"


def choose(shape: AttentionShape, *, cp_degree: int, tokens: int, squares: float, machine: Machine) -> Choice:
    """The exchange with the fewest modelled seconds for such packs (see `price`); of equals the first of `EXCHANGES`.

    `all_gather` and `p2p` can always be used.
    """
    prices, refused = [], []
    for exchange in EXCHANGES:
        if why := refusal(exchange, shape, cp_degree):
            refused.append((exchange, why))
            continue
        prices.append(price(exchange, shape, cp_degree=cp_degree, tokens=tokens, squares=squares, machine=machine))
    prices.sort(key=lambda p: p.seconds)
    # MLA's exchanges on a model without it are no news
    told = tuple((name, why) for name, why in refused if shape.kv_latent or "MLA" not in why)
    return Choice(exchange=prices[0].exchange, prices=tuple(prices), refused=told)
