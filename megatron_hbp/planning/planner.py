"""make_plan: lengths and tiers become a Plan."""

from typing import Literal

import numpy as np

from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.cost import DEFAULT_COST_MODEL, CostModel, preset
from megatron_hbp.planning.packing import isf
from megatron_hbp.planning.plan import DataFingerprint, Plan
from megatron_hbp.planning.packs import Packs, balanced_packs, filled_packs
from megatron_hbp.planning.schedule import balanced_slots, steps_of_slots
from megatron_hbp.planning.types import Tier, check_tiers

Overlong = Literal["error", "drop", "truncate"]


def make_plan(
    lengths: np.ndarray,
    *,
    tiers: tuple[Tier, ...],
    num_ranks: int,
    step_tokens: int,
    seed: int = 0,
    schedule: str = "lockstep",
    cost: CostModel | None = None,
    loss_tokens: np.ndarray | None = None,
    overlong: Overlong = "error",
    curriculum_steps: int = 0,
    store_fingerprint: str | None = None,
) -> Plan:
    """Plan one epoch over samples of `lengths` int [n] tokens. Raises ConfigError and DataError."""
    cost = cost or preset(DEFAULT_COST_MODEL)
    lengths = check_lengths(lengths)
    check_tiers(tiers)
    check_ranks(tiers, num_ranks, step_tokens)
    ids, used, counts = apply_overlong(lengths, tiers[-1].packing_length, overlong)
    rng = np.random.default_rng(seed)
    return assemble(
        ids, used, balanced_packs(used, tiers, num_ranks, rng), tiers=tiers, num_ranks=num_ranks, step_tokens=step_tokens, seed=seed, cost=cost,
        counts=counts, data=DataFingerprint.of(lengths, store_fingerprint), curriculum_steps=curriculum_steps, rng=rng,
        schedule=schedule,
    )  # fmt: skip


def naive_plan(lengths: np.ndarray, *, tiers: tuple[Tier, ...], num_ranks: int, step_tokens: int, seed: int = 0,
               cost: CostModel | None = None, overlong: Overlong = "error") -> Plan:  # fmt: skip
    """Everything packed (ISF) into the longest tier, packs in random order: what HBP is compared with."""
    cost = cost or preset(DEFAULT_COST_MODEL)
    lengths = check_lengths(lengths)
    check_ranks(tiers, num_ranks, step_tokens)
    longest = (tiers[-1],)
    ids, used, counts = apply_overlong(lengths, longest[0].packing_length, overlong)
    rng = np.random.default_rng(seed)
    return assemble(
        ids, used, filled_packs(used, longest, isf, rng), tiers=longest, num_ranks=num_ranks,
        step_tokens=step_tokens, seed=seed, cost=cost, counts=counts, data=DataFingerprint.of(lengths),
        curriculum_steps=0, rng=rng, schedule="lockstep", balanced=False,
    )  # fmt: skip


def check_lengths(lengths: np.ndarray) -> np.ndarray:
    """`lengths` as int64 [n]. Raises DataError for anything but a list of positive whole numbers."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise DataError(f"lengths must be a list of whole numbers, found {lengths.dtype} of shape {lengths.shape}")
    if not len(lengths):
        raise DataError("there are no samples to plan; the list of lengths is empty")
    if lengths.min() < 1:
        raise DataError(f"sample {int(lengths.argmin())} has length {int(lengths.min())}; lengths start at 1")
    return lengths.astype(np.int64)


def check_ranks(tiers: tuple[Tier, ...], num_ranks: int, step_tokens: int) -> None:
    """Raise ConfigError unless gangs of every tier divide the ranks and steps hold something."""
    if num_ranks < 1 or step_tokens < 1:
        raise ConfigError(f"ranks and step tokens must be at least 1, got {num_ranks} and {step_tokens}")
    for tier in tiers:
        if num_ranks % tier.cp_degree:
            raise ConfigError(
                f"{num_ranks} ranks do not divide into gangs of {tier.cp_degree} (tier {tier}); "
                "choose a CP degree that divides the ranks"
            )


def apply_overlong(lengths: np.ndarray, limit: int, policy: Overlong) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Settle samples longer than `limit`: (ids int64, lengths int64, counts). Raises DataError under "error"."""
    too_long = lengths > limit
    num, tokens = int(too_long.sum()), int((lengths[too_long] - limit).sum())
    ids = np.arange(len(lengths))
    if policy == "truncate":
        return ids, np.minimum(lengths, limit), {"dropped": 0, "truncated": num, "dropped_tokens": tokens}
    if num and policy == "error":
        raise DataError(
            f"{num} samples are longer than the longest tier ({limit} tokens), the first is sample "
            f"{int(too_long.argmax())} with {int(lengths[too_long][0])}; add a longer tier, "
            "or use --overlong drop or truncate"
        )
    kept = ids[~too_long]
    if not len(kept):
        raise DataError(f"every sample is longer than the longest tier ({limit} tokens); add a longer tier")
    return kept, lengths[kept], {"dropped": num, "truncated": 0, "dropped_tokens": int(lengths[too_long].sum())}


def assemble(
    ids: np.ndarray, lengths: np.ndarray, packs: Packs, *, tiers: tuple[Tier, ...],
    num_ranks: int, step_tokens: int, seed: int, cost: CostModel, counts: dict[str, int], data: DataFingerprint,
    curriculum_steps: int, rng: np.random.Generator, schedule: str, balanced: bool = True,
) -> Plan:  # fmt: skip
    """Lay packs out over slots, steps and ranks and write the columns."""
    pack_of, pack_tier = packs.pack_of, packs.pack_tier
    num_packs = len(pack_tier)
    cp_degrees = np.array([tier.cp_degree for tier in tiers])[pack_tier]
    tokens = np.bincount(pack_of, lengths, num_packs)
    squares = np.bincount(pack_of, lengths.astype(float) ** 2, num_packs)
    seconds = cost.pack_seconds(tiers, pack_tier, tokens, squares)
    if not balanced:
        seconds = rng.permutation(num_packs).astype(float)
    slots, rank0 = balanced_slots(seconds, cp_degrees, num_ranks)
    num_slots = int(slots.max()) + 1
    local = np.array([tier.local_tokens for tier in tiers])
    slot_tokens = np.zeros(num_slots, np.int64)
    np.maximum.at(slot_tokens, slots, local[pack_tier] * num_ranks)
    slot_cp = np.zeros(num_slots, np.int64)
    np.maximum.at(slot_cp, slots, cp_degrees)
    step_of, place_of = steps_of_slots(slot_tokens, step_tokens, rng, slot_cp == cp_degrees.min(), curriculum_steps)
    step, slot = step_of[slots], place_of[slots]

    order = np.lexsort((rank0, slot, step))
    new_index = np.empty(num_packs, np.int64)
    new_index[order] = np.arange(num_packs)
    by_pack = np.argsort(new_index[pack_of], kind="stable")
    sizes = np.bincount(new_index[pack_of], minlength=num_packs)
    num_ranks_used = int(cp_degrees.sum())
    return Plan(
        tiers=tiers,
        sample_ids=ids[by_pack],
        lengths=lengths[by_pack].astype(np.int32),
        pack_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        pack_tier=pack_tier[order].astype(np.int32),
        pack_step=step[order].astype(np.int32),
        pack_slot=slot[order].astype(np.int32),
        pack_rank0=rank0[order].astype(np.int32),
        num_micro_batches=np.bincount(step_of).astype(np.int32),
        num_ranks=num_ranks,
        schedule=schedule,
        seed=seed,
        step_tokens=step_tokens,
        cost_model=cost.name,
        data=data,
        counts=counts | {"dummies": num_slots * num_ranks - num_ranks_used},
    )
