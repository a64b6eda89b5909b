"""make_plan: lengths and tiers become a Plan."""

from typing import Literal

import numpy as np

from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Tier, check_tiers
from megatron_hbp.planning.cost.model import DEFAULT_COST_MODEL, CostModel, preset
from megatron_hbp.planning.packing.hierarchical import balanced_packs, filled_packs
from megatron_hbp.planning.packing.methods import PackingMethod, isf
from megatron_hbp.planning.schedule.gang import gang_packs
from megatron_hbp.planning.schedule.loss_tokens import even_out
from megatron_hbp.planning.schedule.placement import Occurrences, Request, place_lockstep, write_plan

Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["lockstep", "gang"]

MOST_TOKENS = 2**31 - 1
"""Of a sample and of a pack: plans keep lengths as int32."""
MOST_STEP_TOKENS = 2**53
"""Beyond that sums of tokens are no longer exact in float64."""


def make_plan(
    lengths: np.ndarray,
    *,
    tiers: tuple[Tier, ...],
    num_ranks: int,
    step_tokens: int,
    seed: int = 0,
    schedule: Schedule = "lockstep",
    cost: CostModel | None = None,
    loss_tokens: np.ndarray | None = None,
    repeats: np.ndarray | None = None,
    overlong: Overlong = "error",
    longest: int | None = None,
    curriculum_steps: int = 0,
    slot_multiple: int = 1,
    store_fingerprint: str | None = None,
) -> Plan:
    """Plan one epoch over samples of `lengths` int [n] tokens. Raises ConfigError and DataError.

    `loss_tokens` int [n] are the supervised tokens of each sample: steps are then alike in them too. `repeats` int [n]
    says how often a sample occurs in the epoch (once without it). Samples beyond the longest tier, or beyond `longest`
    tokens, are `overlong`. `curriculum_steps` steps at the start use the lowest CP degree only. Steps get a multiple of
    `slot_multiple` slots (pipeline size, under interleaved pipelines).
    """
    lengths = check_lengths(lengths)
    check_tiers(tiers)
    check_ranks(tiers, num_ranks, step_tokens)
    if schedule not in ("lockstep", "gang"):
        raise ConfigError(f"unknown schedule {schedule!r}; there are lockstep and gang")
    if curriculum_steps < 0 or slot_multiple < 1:
        raise ConfigError("curriculum steps must be at least 0 and the slot multiple at least 1")
    request = Request(
        tiers=tiers,
        num_ranks=num_ranks,
        step_tokens=step_tokens,
        seed=seed,
        schedule=schedule,
        cost=cost or preset(DEFAULT_COST_MODEL),
        data=DataFingerprint.of(lengths, store_fingerprint),
        curriculum_steps=curriculum_steps,
        slot_multiple=slot_multiple,
    )
    limit = min(tiers[-1].packing_length, longest or MOST_TOKENS)
    occurrences, counts = settle(lengths, loss_tokens, repeats, limit, overlong)
    rng = np.random.default_rng(seed)
    if schedule == "gang":
        packs, placement = gang_packs(occurrences, request, rng)
    else:
        packs = balanced_packs(occurrences.lengths, tiers, num_ranks, rng)
        placement = place_lockstep(packs, occurrences, request, rng)
    packs = even_out(packs, occurrences, placement, request)
    return write_plan(packs, occurrences, placement, request, counts)


def naive_plan(
    lengths: np.ndarray,
    *,
    tiers: tuple[Tier, ...],
    num_ranks: int,
    step_tokens: int,
    seed: int = 0,
    cost: CostModel | None = None,
    overlong: Overlong = "error",
    longest: int | None = None,
) -> Plan:
    """Everything packed (ISF) into the longest tier, packs in random order: what HBP is compared with."""
    return method_plan(
        lengths, tiers=tiers[-1:], num_ranks=num_ranks, step_tokens=step_tokens, seed=seed, cost=cost,
        overlong=overlong, longest=longest, method=isf, balanced=False,
    )  # fmt: skip


def method_plan(
    lengths: np.ndarray,
    *,
    tiers: tuple[Tier, ...],
    num_ranks: int,
    step_tokens: int,
    method: PackingMethod,
    balanced: bool,
    seed: int = 0,
    cost: CostModel | None = None,
    overlong: Overlong = "error",
    longest: int | None = None,
) -> Plan:
    """The paper's pipeline with any packing method: GroupData, pack, GreedyFill, and balance batching if `balanced`."""
    lengths = check_lengths(lengths)
    check_tiers(tiers)
    check_ranks(tiers, num_ranks, step_tokens)
    request = Request(
        tiers=tiers, num_ranks=num_ranks, step_tokens=step_tokens, seed=seed, schedule="lockstep",
        cost=cost or preset(DEFAULT_COST_MODEL), data=DataFingerprint.of(lengths),
    )  # fmt: skip
    limit = min(tiers[-1].packing_length, longest or MOST_TOKENS)
    occurrences, counts = settle(lengths, None, None, limit, overlong)
    rng = np.random.default_rng(seed)
    packs = filled_packs(occurrences.lengths, tiers, method, rng)
    placement = place_lockstep(packs, occurrences, request, rng, balanced=balanced)
    return write_plan(packs, occurrences, placement, request, counts)


def check_lengths(lengths: np.ndarray) -> np.ndarray:
    """`lengths` as int64 [n]. Raises DataError for anything but a list of positive whole numbers."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise DataError(f"lengths must be a list of whole numbers, found {lengths.dtype} of shape {lengths.shape}")
    if not len(lengths):
        raise DataError("there are no samples to plan; the list of lengths is empty")
    if lengths.min() < 1:
        raise DataError(f"sample {int(lengths.argmin())} has length {int(lengths.min())}; lengths start at 1")
    if lengths.max() > MOST_TOKENS:
        raise DataError(
            f"sample {int(lengths.argmax())} has length {int(lengths.max())}; a plan counts up to {MOST_TOKENS} tokens"
        )
    return lengths.astype(np.int64)


def check_ranks(tiers: tuple[Tier, ...], num_ranks: int, step_tokens: int) -> None:
    """Raise ConfigError unless gangs of every tier divide the ranks and steps hold something."""
    if num_ranks < 1 or not 1 <= step_tokens <= MOST_STEP_TOKENS:
        raise ConfigError(
            f"ranks must be at least 1 and step tokens between 1 and {MOST_STEP_TOKENS}, got {num_ranks} and "
            f"{step_tokens}"
        )
    if tiers[-1].packing_length > MOST_TOKENS:
        raise ConfigError(f"tier {tiers[-1]}: a pack holds at most {MOST_TOKENS} tokens")
    for tier in tiers:
        if num_ranks % tier.cp_degree:
            raise ConfigError(
                f"{num_ranks} ranks do not divide into gangs of {tier.cp_degree} (tier {tier}); "
                "choose a CP degree that divides the ranks"
            )


def settle(
    lengths: np.ndarray, loss_tokens: np.ndarray | None, repeats: np.ndarray | None, limit: int, overlong: Overlong
) -> tuple[Occurrences, dict[str, int]]:
    """The occurrences to plan and what was dropped or truncated for being longer than `limit`. Raises DataError."""
    for name, values in (("loss_tokens", loss_tokens), ("repeats", repeats)):
        if values is not None and np.shape(values) != lengths.shape:
            raise DataError(f"{name} has shape {np.shape(values)}, the lengths have {lengths.shape}; they must match")
    ids = np.arange(len(lengths)) if repeats is None else np.repeat(np.arange(len(lengths)), repeats)
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
    loss = None if loss_tokens is None else np.asarray(loss_tokens, np.int64)[ids]
    if loss is not None and counts["truncated"]:
        loss = loss * used // lengths[ids]
    return Occurrences(ids=ids, lengths=used, loss_tokens=loss), counts
