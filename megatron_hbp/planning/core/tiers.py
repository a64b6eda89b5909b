"""Tiers: how packs of one length run. The text form here is the only one: command lines, plan files and logs share it.

Legend: a *tier* is one (packing length, CP degree, recompute) setting; a *pack* is what one gang of `cp_degree`
consecutive ranks runs in one slot; local tokens are the tokens of a pack that lie on one rank.

To add an attribute: a field of `Tier`, its text in `Tier.__str__` and `_parse_option`, and the code that uses it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AUTO, EXCHANGES

Layout = Literal["contiguous", "zigzag"]
Kernel = Literal["te", "flash", "varlen", "reference"]
Granularity = Literal["full", "selective"]
Auto = Literal["auto"]

FORM = (
    "LENGTH:cpN[:none|:fullN|:sel=MODULE+MODULE][:exchange=NAME][:kernel=NAME][:zigzag|:contiguous][:alignN], "
    "for example 16384:cp1:full28,131072:cp8"
)
"""The text form of a tier, for messages and help."""


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What a tier recomputes in the backward pass; the default is nothing."""

    granularity: Granularity | None = None
    """None (keep every activation), "full" (whole layers) or "selective" (modules)."""
    num_layers: int = 0
    """Layers of the whole model recomputed, for "full"; pipeline stages share them, each rounding up."""
    modules: tuple[str, ...] = ()
    """Megatron-LM's names of the recomputed modules, for "selective"."""

    def __post_init__(self) -> None:
        if (self.num_layers > 0) != (self.granularity == "full"):
            raise ConfigError(f"recompute: full requires a number of layers of at least 1, got {self}")
        if bool(self.modules) != (self.granularity == "selective") or "" in self.modules:
            raise ConfigError(f"recompute: selective requires at least one module, got {self}")

    @staticmethod
    def parse(text: str) -> "Recompute | None":
        """The policy written as `none`, `fullN` or `sel=MODULE+MODULE`; None for any other text."""
        if text == "none":
            return Recompute()
        if text.startswith("sel="):
            return Recompute(granularity="selective", modules=tuple(text[4:].split("+")))
        if text.startswith("full") and _is_number(text[4:]):
            return full_layers(int(text[4:])) if int(text[4:]) else Recompute(granularity="full")
        return None

    def share_of_layers(self, num_layers: int) -> float:
        """Share of a model's layers recomputed in full: 0 for "selective"."""
        return min(self.num_layers / num_layers, 1.0)

    def __str__(self) -> str:
        if self.granularity == "full":
            return f"full{self.num_layers}"
        return "sel=" + "+".join(self.modules) if self.granularity == "selective" else "none"


def full_layers(count: int) -> Recompute:
    """`count` layers recomputed in full; nothing for 0."""
    return Recompute(granularity="full", num_layers=count) if count else Recompute()


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One packing group of the paper (section 3.2): its packs all run with the same setting."""

    packing_length: int
    """Token slots of a pack."""
    cp_degree: int = 1
    """Ranks that share a pack."""
    recompute: Recompute = field(default_factory=Recompute)
    layout: Layout | Auto = AUTO
    """Tokens of a pack on its ranks: equal slices in order, or two mirrored slices each (causal balance); auto: the
    one that balances the exchange."""
    exchange: str = AUTO
    """What the ranks of a pack exchange in attention (core/exchanges.py); auto: chosen when training starts."""
    kernel: Kernel | Auto = AUTO
    """Which attention kernel runs; auto: the first that is installed and fits device and dtype."""
    alignment: int = 1
    """A rank's tokens are padded to a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("packing_length", "cp_degree", "alignment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tier {self.packing_length}:cp{self.cp_degree}: {name} must be at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in (AUTO, *choices):
                raise ConfigError(
                    f"tier {self.packing_length}:cp{self.cp_degree}: {name} must be one of {', '.join(choices)} or "
                    f"auto, not {getattr(self, name)!r}"
                )
        unit = self.cp_degree * self.alignment * (2 if self.is_zigzag else 1)
        if self.packing_length % unit:
            raise ConfigError(
                f"tier {self}: packing length {self.packing_length} is not a multiple of {unit} "
                "(CP degree x alignment, doubled for zigzag)"
            )

    @property
    def local_tokens(self) -> int:
        """Token slots on one rank."""
        return self.packing_length // self.cp_degree

    @property
    def is_zigzag(self) -> bool:
        """True where a rank holds two mirrored slices."""
        by_exchange = self.exchange != AUTO and EXCHANGES[self.exchange].zigzag
        return self.layout == "zigzag" or (self.layout == AUTO and by_exchange)

    def __str__(self) -> str:
        """The text form; `parse_tiers` reads the same tier from it."""
        parts = [f"{self.packing_length}:cp{self.cp_degree}"]
        parts += [str(self.recompute)] if self.recompute.granularity else []
        parts += [self.layout] if self.layout != AUTO else []
        parts += [f"{name}={getattr(self, name)}" for name in ("exchange", "kernel") if getattr(self, name) != AUTO]
        parts += [f"align{self.alignment}"] if self.alignment > 1 else []
        return ":".join(parts)


_CHOICES: dict[str, tuple[str, ...]] = {
    "layout": get_args(Layout),
    "exchange": tuple(EXCHANGES),
    "kernel": get_args(Kernel),
}


def parse_tiers(text: str, *, fill: Callable[[Tier], Tier] = lambda tier: tier) -> tuple[Tier, ...]:
    """Read tiers as `FORM` describes them, shortest first.

    `fill` completes tiers that name no recompute policy. Raises ConfigError for anything else, and for tiers that do
    not grow in length and CP degree.
    """
    tiers = tuple(_parse_tier(part.strip(), fill) for part in text.split(","))
    check_tiers(tiers)
    return tiers


def check_tiers(tiers: tuple[Tier, ...]) -> None:
    """Raise ConfigError unless there are tiers, growing in packing length and never falling in CP degree."""
    if not tiers:
        raise ConfigError("no tiers given; try 16384:cp1,131072:cp8")
    for short, long in pairwise(tiers):
        if short.packing_length >= long.packing_length or short.cp_degree > long.cp_degree:
            raise ConfigError(f"tiers must grow: {long} cannot follow {short} (list the shortest first)")


def tiers_text(tiers: tuple[Tier, ...]) -> str:
    """The text form of several tiers."""
    return ",".join(map(str, tiers))


def _parse_tier(text: str, fill: Callable[[Tier], Tier]) -> Tier:
    length, *options = text.split(":")
    fields: dict[str, Any] = {"packing_length": _number(length, text)}
    for option in options:
        key, value = _parse_option(option, text)
        if key in fields:
            raise ConfigError(f"tier {text!r}: {key} is given twice")
        fields[key] = value
    if "cp_degree" not in fields:
        raise ConfigError(f"tier {text!r} names no CP degree; write for example {length}:cp1")
    tier = Tier(**fields)
    return tier if "recompute" in fields else fill(tier)


def _parse_option(option: str, text: str) -> tuple[str, object]:
    if (policy := Recompute.parse(option)) is not None:
        return "recompute", policy
    if option in _CHOICES["layout"]:
        return "layout", option
    name, _, choice = option.partition("=")
    if name in ("exchange", "kernel"):
        return name, choice
    for prefix, key in (("align", "alignment"), ("cp", "cp_degree"), ("full", "recompute")):
        if option.startswith(prefix):
            return key, _number(option.removeprefix(prefix), text)
    raise ConfigError(f"tier {text!r}: {option!r} is unknown; a tier is {FORM}")


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 19


def _number(digits: str, text: str) -> int:
    if not _is_number(digits):
        raise ConfigError(f"tier {text!r}: {digits!r} is not a whole number; a tier looks like 16384:cp1")
    return int(digits)
