"""The Plan: who runs what, when, in columns.

    world-size-free half            world-size-bound half
    samples  sample_ids, lengths
    packs    pack_offsets (CSR)     pack_slot, pack_rank0
             pack_tier, pack_step   num_micro_batches [steps]

Pack p holds the occurrences [pack_offsets[p], pack_offsets[p + 1]) of `sample_ids` and `lengths`, in the order in which
they lie in the pack. Packs are sorted by (step, slot, rank0). In lockstep every rank has `num_micro_batches[step]`
slots; a (step, slot, rank) without a pack is a dummy of weight zero that the run time makes up at CP 1.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_hbp.errors import PlanError
from megatron_hbp.planning.core.arrays import segment_sums, stable_order
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier

SCHEMA_VERSION = 3
"""Of plan files. Another version is refused: a plan is made again in seconds, from the same data and options."""

COLUMNS = {
    "sample_ids": "<i8",
    "lengths": "<i4",
    "pack_offsets": "<i8",
    "pack_tier": "<i4",
    "pack_step": "<i4",
    "pack_slot": "<i4",
    "pack_rank0": "<i4",
    "num_micro_batches": "<i4",
}
"""Column of a plan -> its type in a plan file, in file order."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One pack of a plan, as the run time reads it. Samples lie one after the other from offset 0."""

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


@dataclass(frozen=True, kw_only=True)
class DataFingerprint:
    """Which data a plan was made for."""

    num_samples: int
    lengths_sha256: str
    """SHA-256 (hex) of the lengths as little-endian int64."""
    store_fingerprint: str | None = None
    """Fingerprint (hex) of the token store, where the lengths came from one."""

    @classmethod
    def of(cls, samples: Samples) -> "DataFingerprint":
        """Fingerprint of `samples`."""
        raw = np.ascontiguousarray(samples.lengths, dtype="<i8")
        return cls(
            num_samples=len(raw),
            lengths_sha256=hashlib.sha256(raw.data).hexdigest(),
            store_fingerprint=samples.store_fingerprint,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A whole training schedule; two plans are equal when their hashes are."""

    tiers: tuple[Tier, ...]
    """Shortest first."""
    sample_ids: np.ndarray
    """int64 [occurrences], index of the sample in the data."""
    lengths: np.ndarray
    """int32 [occurrences], tokens used of the sample (fewer than it has where over-long ones are truncated)."""
    pack_offsets: np.ndarray
    """int64 [packs + 1]."""
    pack_tier: np.ndarray
    """int32 [packs], index into `tiers`."""
    pack_step: np.ndarray
    """int32 [packs]."""
    pack_slot: np.ndarray
    """int32 [packs], micro-batch index in the step."""
    pack_rank0: np.ndarray
    """int32 [packs], first rank of the gang; a multiple of its CP degree."""
    num_micro_batches: np.ndarray
    """int32 [steps], slots of each step."""
    num_ranks: int
    """Data-parallel ranks, world / (TP x PP)."""
    schedule: str
    """"lockstep" (every slot is a barrier) or "gang" (ranks meet once a step)."""
    seed: int
    step_tokens: int
    """Tokens asked for in a step."""
    cost: Mapping[str, Any]
    """The cost model that balanced the plan, as the JSON values of cost/file.py."""
    data: DataFingerprint
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What was done with what did not fit: "dropped" and "truncated" samples, "dropped_tokens", "dummies"."""

    @staticmethod
    def build(
        *, tiers: tuple[Tier, ...], sample_ids: np.ndarray, lengths: np.ndarray, pack_of: np.ndarray,
        pack_tier: np.ndarray, step: np.ndarray, slot: np.ndarray, rank0: np.ndarray,
        num_micro_batches: np.ndarray | None = None, counts: Mapping[str, int] | None = None, **fields: Any,
    ) -> "Plan":  # fmt: skip
        """The plan of packs given in any order; `fields` are the fields of Plan that describe it as a whole.

        Args:
            tiers: shortest first.
            sample_ids: int [occurrences].
            lengths: int [occurrences], tokens used.
            pack_of: int [occurrences], pack of each; occurrences of a pack stay in order, but in packs that ranks
                share the longest come first, so that short ones lie together and on one rank each.
            pack_tier: int [packs]; likewise `step`, `slot`, `rank0`.
            num_micro_batches: int [steps], slots of each step; without it as many as the packs take.
            counts: what did not fit; dummies are counted here.
        """
        order = np.lexsort((rank0, slot, step))
        new_index = np.empty(len(order), np.int64)
        new_index[order] = np.arange(len(order))
        pack_of = new_index[pack_of]
        widths = np.array([tier.cp_degree for tier in tiers])[pack_tier]
        by_pack = _longest_first_in_shared(stable_order(pack_of), pack_of, lengths, widths[order] > 1)
        if num_micro_batches is None:
            num_micro_batches = np.zeros(int(step.max()) + 1, np.int32)
            np.maximum.at(num_micro_batches, step, slot + 1)
        idle = int(num_micro_batches.sum()) * fields["num_ranks"] - int(widths.sum())
        return Plan(
            tiers=tiers,
            sample_ids=sample_ids[by_pack],
            lengths=lengths[by_pack].astype(np.int32),
            pack_offsets=np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=len(order)))]),
            pack_tier=pack_tier[order].astype(np.int32),
            pack_step=step[order].astype(np.int32),
            pack_slot=slot[order].astype(np.int32),
            pack_rank0=rank0[order].astype(np.int32),
            num_micro_batches=num_micro_batches.astype(np.int32),
            counts=dict(counts or {}) | {"dummies": idle if fields["schedule"] == "lockstep" else 0},
            **fields,
        )  # fmt: skip

    def subset(self, packs: np.ndarray, **placement: Any) -> "Plan":
        """The plan of some packs, int [m], elsewhere: `placement` as in `build` (step, slot, rank0, ...)."""
        sizes = np.diff(self.pack_offsets)[packs]
        first = np.cumsum(sizes) - sizes
        occurrences = np.repeat(self.pack_offsets[:-1][packs] - first, sizes) + np.arange(sizes.sum())
        whole = ("tiers", "num_ranks", "schedule", "seed", "step_tokens", "cost", "data", "counts")
        return Plan.build(
            sample_ids=self.sample_ids[occurrences],
            lengths=self.lengths[occurrences],
            pack_of=np.repeat(np.arange(len(packs)), sizes),
            pack_tier=self.pack_tier[packs],
            **{name: getattr(self, name) for name in whole} | placement,
        )

    @property
    def num_packs(self) -> int:
        """Packs of the whole plan."""
        return len(self.pack_tier)

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return len(self.num_micro_batches)

    @property
    def max_micro_batches(self) -> int:
        """Slots of the step that has most."""
        return int(self.num_micro_batches.max(initial=0))

    @cached_property
    def pack_cp(self) -> np.ndarray:
        """int64 [packs], CP degree."""
        return np.array([tier.cp_degree for tier in self.tiers], np.int64)[self.pack_tier]

    @cached_property
    def pack_capacity(self) -> np.ndarray:
        """int64 [packs], token slots."""
        return np.array([tier.packing_length for tier in self.tiers], np.int64)[self.pack_tier]

    @cached_property
    def pack_tokens(self) -> np.ndarray:
        """int64 [packs], real tokens."""
        return segment_sums(self.lengths.astype(np.int64), self.pack_offsets)

    @cached_property
    def pack_squares(self) -> np.ndarray:
        """int64 [packs], sum of squared sample lengths: what causal attention costs."""
        return segment_sums(self.lengths.astype(np.int64) ** 2, self.pack_offsets)

    @cached_property
    def grid(self) -> np.ndarray:
        """int32 [steps, max_micro_batches, num_ranks]: the pack that a rank runs there, -1 for none."""
        grid = np.full((self.num_steps, self.max_micro_batches, self.num_ranks), -1, np.int32)
        for cp_degree in np.unique(self.pack_cp):
            packs = np.flatnonzero(self.pack_cp == cp_degree)
            ranks = self.pack_rank0[packs, None] + np.arange(cp_degree)
            grid[self.pack_step[packs, None], self.pack_slot[packs, None], ranks] = packs[:, None]
        return grid

    def pack_at(self, step: int, slot: int, rank: int) -> int:
        """Index of the pack that `rank` runs in this slot, or -1."""
        return int(self.grid[step, slot, rank])

    def pack(self, index: int) -> Pack:
        """The pack with this index."""
        part = slice(self.pack_offsets[index], self.pack_offsets[index + 1])
        lengths = self.lengths[part]
        return Pack(
            index=index,
            tier=int(self.pack_tier[index]),
            step=int(self.pack_step[index]),
            slot=int(self.pack_slot[index]),
            rank0=int(self.pack_rank0[index]),
            sample_ids=self.sample_ids[part],
            lengths=lengths,
            offsets=np.cumsum(lengths, dtype=np.int64) - lengths,
        )

    def canonical_bytes(self) -> bytes:
        """The plan as bytes, the same on every machine: header length, JSON header with sorted keys, raw columns."""
        columns = {name: np.ascontiguousarray(getattr(self, name), dtype=kind) for name, kind in COLUMNS.items()}
        header = {
            "schema_version": SCHEMA_VERSION,
            "tiers": list(map(str, self.tiers)),
            "data": dataclasses.asdict(self.data),
            "counts": dict(self.counts),
            "columns": {name: len(column) for name, column in columns.items()},
            **{name: getattr(self, name) for name in ("num_ranks", "schedule", "seed", "step_tokens", "cost")},
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
        return b"".join([len(text).to_bytes(8, "little"), text, *(column.tobytes() for column in columns.values())])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical bytes."""
        return hashlib.sha256(self.canonical_bytes()).hexdigest()

    def check(self) -> None:
        """Raise PlanError unless the columns agree with each other; says the first thing that is wrong."""
        for problem, is_wrong in _problems(self):
            if is_wrong:
                raise PlanError(f"plan is inconsistent: {problem}; make it again with `hbp plan`")


def _problems(plan: Plan) -> Iterator[tuple[str, bool | np.bool]]:
    """Yield (description, found) one after the other; later ones rely on earlier ones not being found."""
    packs = plan.num_packs
    yield "no tiers, ranks or steps", not plan.tiers or plan.num_ranks < 1
    per_pack = (plan.pack_tier, plan.pack_step, plan.pack_slot, plan.pack_rank0, plan.pack_offsets[1:])
    yield "columns of unequal length", any(len(column) != packs for column in per_pack)
    yield "sample columns of unequal length", len(plan.sample_ids) != len(plan.lengths)
    sizes = np.diff(plan.pack_offsets)
    yield (
        "pack offsets do not cover the samples",
        plan.pack_offsets[0] != 0 or plan.pack_offsets[-1] != len(plan.sample_ids) or (sizes < 1).any(),
    )
    yield "sample ids outside the data", _outside(plan.sample_ids, plan.data.num_samples)
    yield "lengths below one token", (plan.lengths < 1).any()
    yield "unknown tier", _outside(plan.pack_tier, len(plan.tiers))
    yield "pack over its packing length", (plan.pack_tokens > plan.pack_capacity).any()
    yield "pack outside the steps", _outside(plan.pack_step, plan.num_steps)
    yield (
        "pack outside the slots of its step",
        (plan.pack_slot < 0).any() or (plan.pack_slot >= plan.num_micro_batches[plan.pack_step]).any(),
    )
    yield (
        "gang outside the ranks or not aligned to its CP degree",
        (plan.pack_rank0 < 0).any()
        or (plan.pack_rank0 + plan.pack_cp > plan.num_ranks).any()
        or (plan.pack_rank0 % plan.pack_cp).any(),
    )
    yield "two packs on one rank in one slot", np.count_nonzero(plan.grid >= 0) != plan.pack_cp.sum()
    order = np.lexsort((plan.pack_rank0, plan.pack_slot, plan.pack_step))
    yield "packs not in the order of steps, slots and ranks", (np.diff(order) < 0).any()


def _outside(values: np.ndarray, limit: int) -> bool:
    return bool(len(values)) and not 0 <= values.min() <= values.max() < limit


def _longest_first_in_shared(
    by_pack: np.ndarray, pack_of: np.ndarray, lengths: np.ndarray, is_shared: np.ndarray
) -> np.ndarray:
    """`by_pack` int64 [n] (occurrences in order of packs) with those of each shared pack reordered, longest first."""
    places = np.flatnonzero(is_shared[pack_of[by_pack]])
    shared = by_pack[places]
    by_pack[places] = shared[np.lexsort((-lengths[shared].astype(np.int64), pack_of[shared]))]
    return by_pack
