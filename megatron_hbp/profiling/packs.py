"""Synthetic packs: a plan of one slot in which every gang runs the same pack, and random tokens for it."""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
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
    gangs = num_ranks // tier.cp_degree
    samples = Samples.of(np.tile(np.asarray(lengths, np.int64), gangs))
    zeros = np.zeros(gangs, np.int64)
    plan = Plan.build(
        tiers=(tier,), sample_ids=np.arange(len(samples)), lengths=samples.lengths,
        pack_of=np.repeat(np.arange(gangs), len(lengths)), pack_tier=zeros, step=zeros, slot=zeros,
        rank0=np.arange(gangs) * tier.cp_degree, num_ranks=num_ranks, schedule="lockstep", seed=0,
        step_tokens=int(samples.lengths.sum()), cost={}, data=DataFingerprint.of(samples),
    )  # fmt: skip
    plan.check()
    return plan
