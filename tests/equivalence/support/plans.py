"""Plans and stores written by hand, so that a test says exactly which rank runs what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class MemoryStore:
    """A token store in memory: random tokens, random loss masks."""

    samples: list[tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def random(lengths: Sequence[int], *, vocabulary: int, seed: int = 0) -> "MemoryStore":
        """One sample per length; about two thirds of the tokens are to be predicted."""
        rng = np.random.default_rng(seed)
        return MemoryStore(
            samples=[
                (rng.integers(0, vocabulary, n).astype(np.int64), (rng.random(n) < 0.67).astype(np.uint8))
                for n in lengths
            ]
        )

    @property
    def lengths(self) -> np.ndarray:
        """int64 [samples]."""
        return np.array([len(tokens) for tokens, _ in self.samples])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss mask."""
        return self.samples[index]


def plan_of(
    packs: Sequence[tuple[int, int, int, int, Sequence[int]]],
    *,
    tiers: Sequence[Tier],
    lengths: np.ndarray,
    num_ranks: int,
) -> Plan:
    """A plan from (step, slot, rank0, tier, sample ids) of each pack."""
    packs = sorted(packs)
    ids = [np.asarray(p[4], np.int64) for p in packs]
    steps = 1 + max(p[0] for p in packs)
    slots = np.zeros(steps, np.int32)
    for step, slot, *_ in packs:
        slots[step] = max(slots[step], slot + 1)
    plan = Plan(
        tiers=tuple(tiers),
        sample_ids=np.concatenate(ids),
        lengths=lengths[np.concatenate(ids)].astype(np.int32),
        pack_offsets=np.cumsum([0, *map(len, ids)]),
        pack_tier=np.array([p[3] for p in packs], np.int32),
        pack_step=np.array([p[0] for p in packs], np.int32),
        pack_slot=np.array([p[1] for p in packs], np.int32),
        pack_rank0=np.array([p[2] for p in packs], np.int32),
        num_micro_batches=slots,
        num_ranks=num_ranks,
        schedule="lockstep",
        seed=0,
        step_tokens=0,
        cost={},
        data=DataFingerprint.of(Samples.of(lengths)),
    )
    plan.check()
    return plan
