"""What is asked of a planner, once and checked: every planner is called as `planner(samples, request) -> Plan`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import MAX_TOKENS, Samples
from megatron_hbp.planning.core.tiers import Tier, check_tiers
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.presets import DEFAULT_COST_MODEL, preset

Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["lockstep", "gang"]

MAX_STEP_TOKENS = 2**53
"""Beyond that sums of tokens are no longer exact in float64."""
MAX_RANKS = 2**17
"""Data-parallel ranks: more than the largest clusters have, and few enough that a mistyped number is refused at once."""
OUR_PACKING = "balanced"
"""Packs full and alike in content (packing/hierarchical.py); other names are those of packing/methods.py."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One epoch's plan. Raises ConfigError for what contradicts itself."""

    tiers: tuple[Tier, ...] = ()
    """Shortest first; empty while they are still to be selected (select/)."""
    num_ranks: int
    """Data-parallel ranks: world size / (TP x PP)."""
    step_tokens: int
    """Tokens of one optimizer step, about."""
    seed: int = 0
    schedule: Schedule = "lockstep"
    """"lockstep" (every slot is a barrier) or "gang" (ranks meet once a step: dense models without pipeline)."""
    cost: CostModel = field(default_factory=lambda: preset(DEFAULT_COST_MODEL))
    packing: str = OUR_PACKING
    """How samples become packs: ours, or the paper's pipeline with a method of packing/methods.py."""
    is_balanced: bool = True
    """Packs of like cost run side by side; False puts them in random order (only with a method of the paper)."""
    overlong: Overlong = "error"
    """What becomes of samples beyond the longest tier, or beyond `longest`."""
    longest: int | None = None
    curriculum_steps: int = 0
    """Steps at the start that use the lowest CP degree only."""
    slot_multiple: int = 1
    """Steps get a multiple of so many slots (pipeline size, under interleaved pipelines)."""

    def __post_init__(self) -> None:
        check_ranks(self.tiers, self.num_ranks)
        if not 1 <= self.step_tokens <= MAX_STEP_TOKENS:
            raise ConfigError(f"step tokens must be between 1 and {MAX_STEP_TOKENS}, got {self.step_tokens}")
        if self.schedule not in ("lockstep", "gang"):
            raise ConfigError(f"unknown schedule {self.schedule!r}; there are lockstep and gang")
        if self.curriculum_steps < 0 or self.slot_multiple < 1:
            raise ConfigError("curriculum steps must be at least 0 and the slot multiple at least 1")
        if self.schedule == "gang" and self.packing != OUR_PACKING:
            raise ConfigError(f"packing {self.packing!r} requires --schedule lockstep; a gang schedule packs by itself")

    @property
    def limit(self) -> int:
        """Tokens of the longest sample that is planned as it is."""
        return min([tier.packing_length for tier in self.tiers[-1:]] + [self.longest or MAX_TOKENS])


Planner = Callable[[Samples, Request], Plan]


@dataclass(frozen=True, kw_only=True, eq=False)
class Occurrences:
    """The multiset of samples that a plan runs, each occurrence exactly once."""

    ids: np.ndarray
    """int64 [n], sample of each occurrence."""
    lengths: np.ndarray
    """int64 [n], tokens used."""
    loss_tokens: np.ndarray | None
    """int64 [n], supervised tokens."""
    counts: dict[str, int]
    """Samples dropped and truncated for their length, and the tokens of both."""


def check_ranks(tiers: tuple[Tier, ...], num_ranks: int) -> None:
    """Raise ConfigError unless the tiers grow and gangs of every tier divide the ranks."""
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ConfigError(f"ranks must be between 1 and {MAX_RANKS}, got {num_ranks}")
    if tiers:
        check_tiers(tiers)
    for tier in tiers:
        if tier.packing_length > MAX_TOKENS:
            raise ConfigError(f"tier {tier}: a pack holds at most {MAX_TOKENS} tokens")
        if num_ranks % tier.cp_degree:
            raise ConfigError(
                f"{num_ranks} ranks do not divide into gangs of {tier.cp_degree} (tier {tier}); "
                "choose a CP degree that divides the ranks"
            )


def occurrences(samples: Samples, request: Request) -> Occurrences:
    """The occurrences to plan: repeats counted, over-long samples dropped or truncated. Raises DataError."""
    lengths, limit, overlong = samples.lengths, request.limit, request.overlong
    ids = np.arange(len(lengths)) if samples.repeats is None else np.repeat(np.arange(len(lengths)), samples.repeats)
    used = lengths[ids]
    too_long = used > limit
    num_long = int(too_long.sum())
    if num_long and overlong == "error":
        raise DataError(
            f"{num_long} samples are longer than the longest tier ({limit} tokens), the first is sample "
            f"{int(ids[too_long.argmax()])} with {int(used[too_long][0])}; add a longer tier, "
            "or use --overlong drop or truncate"
        )
    counts = {"dropped": 0, "truncated": 0, "dropped_tokens": 0}
    if overlong == "truncate":
        counts |= {"truncated": num_long, "dropped_tokens": int((used[too_long] - limit).sum())}
        used = np.minimum(used, limit)
    elif num_long:
        counts |= {"dropped": num_long, "dropped_tokens": int(used[too_long].sum())}
        ids, used = ids[~too_long], used[~too_long]
    if not len(ids):
        raise DataError(f"nothing is left to plan: no sample occurs that is at most {limit} tokens; add a longer tier")
    # Truncation may cut supervised tokens; without the masks the share that stays is the best guess.
    loss = None if samples.loss_tokens is None else samples.loss_tokens[ids]
    if loss is not None and counts["truncated"]:
        loss = loss * used // lengths[ids]
    return Occurrences(ids=ids, lengths=used, loss_tokens=loss, counts=counts)
