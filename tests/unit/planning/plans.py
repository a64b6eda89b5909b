"""Plans in one line."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_hbp.planning import Plan, Request, Samples, Tier, make_plan, parse_tiers


def tiers_of(tiers: str | tuple[Tier, ...]) -> tuple[Tier, ...]:
    """Tiers from their text form."""
    return parse_tiers(tiers) if isinstance(tiers, str) else tiers


def plan_of(
    lengths: np.ndarray | Sequence[int],
    tiers: str | tuple[Tier, ...],
    *,
    num_ranks: int,
    step_tokens: int,
    loss_tokens: np.ndarray | None = None,
    repeats: np.ndarray | None = None,
    **options: Any,
) -> Plan:
    """The checked plan of samples of these lengths; `options` are further fields of the request."""
    samples = Samples.of(np.asarray(lengths), loss_tokens, repeats)
    request = Request(tiers=tiers_of(tiers), num_ranks=num_ranks, step_tokens=step_tokens, **options)
    plan = make_plan(samples, request)
    plan.check()
    return plan


def few_for_some(lengths: np.ndarray) -> np.ndarray:
    """Loss tokens: three samples in ten are short answers to long prompts."""
    few = np.random.default_rng(7).random(len(lengths)) < 0.3
    return np.where(few, lengths // 20 + 1, lengths)
