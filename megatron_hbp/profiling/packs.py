"""Synthetic packs: a plan of one slot in which every gang runs the same pack, and random tokens for it."""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class SyntheticStore:
    """Tokens and loss masks that nobody wrote: a token store for a feed, as many samples as are asked for."""

    lengths: np.ndarray
    """int64 [samples]."""
    vocabulary: int
    supervised: float
    """Share of the tokens that are to be predicted."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [length] and loss mask uint8 [length], the same each time."""
        random = np.random.default_rng(index)
        length = int(self.lengths[index])
        tokens = random.integers(0, self.vocabulary, length)
        return tokens, (random.random(length) < self.supervised).astype(np.uint8)


def plan_of_one_pack(lengths: np.ndarray, tier: Tier, num_ranks: int) -> Plan:
    """One step of one slot: num_ranks / CP degree gangs, each with a pack of samples of these lengths."""
    gangs, count = num_ranks // tier.cp_degree, len(lengths)
    every = np.tile(np.asarray(lengths, np.int64), gangs)
    plan = Plan(
        tiers=(tier,),
        sample_ids=np.arange(len(every), dtype=np.int64),
        lengths=every.astype(np.int32),
        pack_offsets=np.arange(gangs + 1, dtype=np.int64) * count,
        pack_tier=np.zeros(gangs, np.int32),
        pack_step=np.zeros(gangs, np.int32),
        pack_slot=np.zeros(gangs, np.int32),
        pack_rank0=np.arange(gangs, dtype=np.int32) * tier.cp_degree,
        num_micro_batches=np.ones(1, np.int32),
        num_ranks=num_ranks,
        schedule="lockstep",
        seed=0,
        step_tokens=int(every.sum()),
        cost_model="none",
        data=DataFingerprint.of(every),
    )
    plan.check()
    return plan
