"""Tiers and packs: the words of a plan.

Legend: a *tier* is one (packing length, CP degree, recompute) setting; a *pack* is what one gang of `cp_degree`
consecutive ranks runs in one slot; local tokens are the tokens of a pack that lie on one rank.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AUTO, EXCHANGES, ZIGZAG, Exchange

Layout = Literal["contiguous", "zigzag"]
Kernel = Literal["te", "flash", "varlen", "reference"]
Granularity = Literal["full", "selective"]
Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What a tier recomputes in the backward pass; the default is nothing."""

    granularity: Granularity | None = None
    """None (keep every activation), "full" (whole layers) or "selective" (modules)."""
    num_layers: int = 0
    """Layers of the whole model recomputed, for "full"; pipeline stages share them, each rounding up."""
    modules: tuple[str, ...] = ()
    """Megatron's names of the recomputed modules, for "selective"."""

    def __post_init__(self) -> None:
        if (self.num_layers > 0) != (self.granularity == "full"):
            raise ConfigError(f"recompute: full needs a number of layers of at least 1, got {self}")
        if bool(self.modules) != (self.granularity == "selective") or "" in self.modules:
            raise ConfigError(f"recompute: selective needs at least one module, got {self}")

    def share_of_layers(self, num_layers: int) -> float:
        """Share of a model's layers recomputed in full: 0 for "selective"."""
        return min(self.num_layers / num_layers, 1.0)

    def __str__(self) -> str:
        if self.granularity == "full":
            return f"full{self.num_layers}"
        return "sel=" + "+".join(self.modules) if self.granularity == "selective" else "none"


def layers(count: int) -> Recompute:
    """`count` layers recomputed in full."""
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
    exchange: Exchange | Auto = AUTO
    """What the ranks of a pack exchange in attention (planning/exchange.py); auto: chosen when training starts."""
    kernel: Kernel | Auto = AUTO
    """Which attention kernel runs; auto: the first that is installed and fits device and dtype."""
    alignment: int = 1
    """A rank's tokens are padded to a multiple of this (tensor parallel width, FP8)."""

    def __post_init__(self) -> None:
        for name in ("packing_length", "cp_degree", "alignment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tier {self.packing_length}:cp{self.cp_degree}: {name} must be at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in (AUTO, *choices):
                raise ConfigError(
                    f"tier {self.packing_length}:cp{self.cp_degree}: {name} is one of {', '.join(choices)} or auto, "
                    f"not {getattr(self, name)!r}"
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
        return self.layout == "zigzag" or (self.layout == AUTO and self.exchange in ZIGZAG)

    def __str__(self) -> str:
        parts = [f"{self.packing_length}:cp{self.cp_degree}"]
        parts += [str(self.recompute)] if self.recompute.granularity else []
        parts += [self.layout] if self.layout != AUTO else []
        parts += [f"{name}={getattr(self, name)}" for name in ("exchange", "kernel") if getattr(self, name) != AUTO]
        parts += [f"align{self.alignment}"] if self.alignment > 1 else []
        return ":".join(parts)


_CHOICES: dict[str, tuple[str, ...]] = {
    "layout": get_args(Layout),
    "exchange": EXCHANGES,
    "kernel": get_args(Kernel),
}


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One pack of a plan, as the run time wants it. Samples lie one after the other from offset 0."""

    index: int
    """Which pack of the plan."""
    tier: int
    """Which tier of the plan."""
    step: int
    slot: int
    """Micro-batch index in the step."""
    rank0: int
    """First rank of the gang [rank0, rank0 + cp_degree)."""
    sample_ids: np.ndarray
    """int64 [samples]."""
    lengths: np.ndarray
    """int32 [samples], tokens."""
    offsets: np.ndarray
    """int64 [samples], where each sample starts in the pack."""

    @property
    def num_tokens(self) -> int:
        """Real tokens of the pack."""
        return int(self.lengths.sum(dtype=np.int64))


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """Read tiers as the command line writes them, shortest first: `16384:cp1:full28,131072:cp8:zigzag`.

    After LENGTH:cpN come, in any order: fullN (recompute N layers), sel=MODULE+MODULE (recompute these), none,
    zigzag, contiguous, exchange=NAME, kernel=NAME, alignN. Raises ConfigError for anything else, and for tiers that do
    not grow in length and CP degree.
    """
    tiers = tuple(_parse_tier(part.strip()) for part in text.split(","))
    check_tiers(tiers)
    return tiers


def check_tiers(tiers: tuple[Tier, ...]) -> None:
    """Raise ConfigError unless there are tiers, growing in packing length and never falling in CP degree."""
    if not tiers:
        raise ConfigError("no tiers given; try 16384:cp1,131072:cp8")
    for short, long in pairwise(tiers):
        if short.packing_length >= long.packing_length or short.cp_degree > long.cp_degree:
            raise ConfigError(f"tiers must grow: {long} cannot follow {short} (list the shortest first)")


def _parse_tier(text: str) -> Tier:
    length, *options = text.split(":")
    fields: dict = {"packing_length": _number(length, text), "cp_degree": None}
    for option in options:
        key, value = _parse_option(option, text)
        if fields.get(key) is not None:
            raise ConfigError(f"tier {text!r}: {key} is given twice")
        fields[key] = value
    if fields["cp_degree"] is None:
        raise ConfigError(f"tier {text!r} names no CP degree; write for example {length}:cp1")
    return Tier(**fields)


def _parse_option(option: str, text: str) -> tuple[str, object]:
    if option == "none":
        return "recompute", Recompute()
    if option in _CHOICES["layout"]:
        return "layout", option
    name, _, choice = option.partition("=")
    if name in ("exchange", "kernel"):
        return name, choice
    if option.startswith("sel="):
        return "recompute", Recompute(granularity="selective", modules=tuple(option[4:].split("+")))
    if option.startswith("full"):
        return "recompute", Recompute(granularity="full", num_layers=_number(option[4:], text))
    if option.startswith("align"):
        return "alignment", _number(option[5:], text)
    if option.startswith("cp"):
        return "cp_degree", _number(option[2:], text)
    raise ConfigError(
        f"tier {text!r}: {option!r} is unknown; a tier is "
        "LENGTH:cpN[:fullN|:sel=MODULE+MODULE][:exchange=NAME][:kernel=NAME][:zigzag][:alignN]"
    )


def _number(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit()):
        raise ConfigError(f"tier {text!r}: {digits!r} is not a whole number; a tier looks like 16384:cp1")
    return int(digits)
