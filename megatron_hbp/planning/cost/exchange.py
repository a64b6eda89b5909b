"""What an exchange costs on a machine, and which one costs least."""

from dataclasses import dataclass

from megatron_hbp.planning.core.exchanges import EXCHANGES, Exchange, usable
from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.core.model import AttentionShape


@dataclass(frozen=True, kw_only=True)
class Price:
    """Seconds of one exchange in the forward and backward of one layer, for all tokens of a rank."""

    exchange: str
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
    exchange: Exchange, shape: AttentionShape, *, cp_degree: int, tokens: int, squares: float, machine: Machine
) -> Price:
    """Price of `exchange`, in bf16, for a pack of `tokens` whose samples' squared lengths sum to `squares`.

    `shape` and `machine` are those of one rank.
    """
    c, local = cp_degree, tokens / cp_degree
    transfer = 2 * exchange.elements(shape, c) * local * (1 + exchange.backward_bytes) / machine.bandwidth(c)
    # up-projected in the forward and once more in the backward, whose two GEMMs come on top
    extra = 4 * exchange.extra_flops(shape, c) * local / machine.linear_rate
    hidden = 0.0
    if exchange.is_ring:
        widths = shape.qk_width + shape.v_width
        flops = 3.5 * shape.num_query_heads * widths * squares / c
        hidden = machine.overlap * min(transfer, flops / machine.attention_rate * (c - 1) / c)
        # each of the c - 1 further steps reads and writes an fp32 sum and reads its own share: of the output in the
        # forward, of the queries' gradient in the backward
        extra += (c - 1) * local * shape.num_query_heads * widths * 12 / machine.memory_bandwidth
    return Price(exchange=exchange.name, transfer=transfer, hidden=hidden, extra=extra)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Every exchange that can be used, cheapest first, and why others cannot."""

    prices: tuple[Price, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def exchange(self) -> str:
        """The cheapest."""
        return self.prices[0].exchange

    @property
    def reason(self) -> str:
        """One line for the log."""
        found = ", ".join(f"{p.exchange} {p.seconds * 1e3:.3g} ms" for p in self.prices)
        dropped = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.exchange} (exposed per layer: {found}{dropped})"


def choose_exchange(
    shape: AttentionShape, *, cp_degree: int, tokens: int, squares: float, machine: Machine, zigzag: bool = True
) -> Choice:
    """Exchanges by modelled seconds for such packs (see `price`); of equals the first of `EXCHANGES`.

    Without `zigzag` those that need mirrored slices are left out (packing lengths that twice the degree does not
    divide). Of a model without MLA, its exchanges are not listed among the refused.
    """
    found = [
        price(exchange, shape, cp_degree=cp_degree, tokens=tokens, squares=squares, machine=machine)
        for exchange in usable(shape, cp_degree)
        if zigzag or not exchange.zigzag
    ]
    refused = tuple(
        (each.name, why)
        for each in EXCHANGES.values()
        if (why := each.refusal(shape, cp_degree)) and (shape.kv_latent or not each.needs_latents)
    )
    return Choice(prices=tuple(sorted(found, key=lambda p: p.seconds)), refused=refused)
