"""Each rank reads its own part of the plan: no sampler, no broadcast, no collective in the data path.

Every rank of a gang, every tensor-parallel rank and every pipeline stage maps the same store and cuts out its own
slice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import PlanError
from megatron_hbp.model.context import MicroBatchContext
from megatron_hbp.model.loss import LossRows
from megatron_hbp.model.split import split_pack
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.exchange import AUTO
from megatron_hbp.planning.plan import Plan
from megatron_hbp.planning.types import Recompute, Tier
from megatron_hbp.training.batch import PackSlice, padded_length, slice_of_pack

DUMMY = -1
"""Tier index of a micro-batch that the plan leaves empty on a rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one rank runs in one slot of a step. `s` local tokens."""

    step: int
    slot: int
    tier: int
    """Index into the plan's tiers, or DUMMY."""
    sample_ids: np.ndarray
    """int64, the samples of the whole pack."""
    tokens: torch.Tensor
    """int64 [1, s]."""
    loss_rows: LossRows
    num_local_tokens: int
    """Tokens of the slice without padding."""
    context: MicroBatchContext


class Feed:
    """Iterates over one rank's micro-batches of a plan, step by step, from any step on."""

    def __init__(
        self,
        *,
        plan: Plan,
        store: TokenStore,
        groups: CpGroups,
        rank: int,
        unit: int,
        full_length: bool,
        device: torch.device,
        tiers: Sequence[Tier] | None = None,
        joint_recompute: bool = False,
        first_step: int = 0,
        cyclic: bool = False,
    ):
        """Check that the plan belongs to the store, and start at `first_step`.

        Args:
            plan: the schedule.
            store: the tokens it schedules.
            groups: the context-parallel groups of this rank.
            rank: data-parallel rank.
            unit: local tokens are padded to a multiple of this (tensor-parallel width under sequence parallelism).
            full_length: pad every pack to its tier's packing length (pipeline stages exchange fixed shapes).
            device: where the tensors go.
            tiers: the plan's tiers with every `auto` exchange chosen; those left are run as a2a.
            joint_recompute: give all ranks of a slot one recompute policy (experts are exchanged, see `joint_policy`).
            first_step: step to start at (resume).
            cyclic: start again after the last step (evaluation), instead of ending.
        """
        self.plan, self.store, self.groups, self.rank = plan, store, groups, rank
        self.unit, self.full_length, self.device = unit, full_length, device
        self.tiers = tuple(
            replace(tier, exchange="a2a") if tier.exchange == AUTO else tier for tier in tiers or plan.tiers
        )
        self.joint_recompute = joint_recompute
        self._micro_batches = self._iterate(first_step, cyclic)

    def __iter__(self) -> "Feed":
        """A feed is its own iterator (Megatron-LM's external dataloader)."""
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch of this rank."""
        return next(self._micro_batches)

    def _iterate(self, first_step: int, cyclic: bool) -> Iterator[MicroBatch]:
        step = first_step
        while cyclic or step < self.plan.num_steps:
            for slot in self.slots(step % self.plan.num_steps):
                yield self.micro_batch(step % self.plan.num_steps, slot)
            step += 1

    def slots(self, step: int) -> list[int]:
        """The slots of `step` that this rank runs, in order.

        In lockstep all of them, a dummy where it has no pack. In a gang schedule those where it has one; ranks meet
        once a step, and a rank without any pack comes with one dummy.
        """
        every = range(int(self.plan.num_micro_batches[step]))
        if self.plan.schedule == "lockstep":
            return list(every)
        return [slot for slot in every if self.plan.pack_at(step, slot, self.rank) >= 0] or [0]

    def local_tokens(self, step: int, slot: int) -> int:
        """Padded tokens of this rank in `slot` of `step`, from the plan alone: all its pipeline stages know them."""
        index = self.plan.pack_at(step, slot, self.rank)
        if index < 0:
            return self.tiers[0].local_tokens if self.full_length else self.unit
        tier = self.tiers[self.plan.pack_tier[index]]
        if self.full_length:
            return tier.local_tokens
        unit = int(np.lcm(self.unit, tier.alignment)) * (2 if tier.is_zigzag else 1)
        num_tokens = int(self.plan.pack_tokens[index])
        return padded_length(num_tokens, cp_degree=tier.cp_degree, unit=unit) // tier.cp_degree

    def micro_batch(self, step: int, slot: int) -> MicroBatch:
        """What this rank runs in `slot` of `step`."""
        index = self.plan.pack_at(step, slot, self.rank)
        if index < 0:
            return self._dummy(step, slot)
        pack = self.plan.pack(index)
        tier = self.tiers[pack.tier]
        length = self.local_tokens(step, slot) * tier.cp_degree
        samples = []
        for sample_id, num_tokens in zip(pack.sample_ids, pack.lengths, strict=True):
            tokens, loss_mask = self.store.sample(int(sample_id))
            if len(tokens) < num_tokens:
                raise PlanError(
                    f"the plan uses {num_tokens} tokens of sample {sample_id}, the store has {len(tokens)}: "
                    f"the plan belongs to other data; make it again with `hbp plan --store`"
                )
            samples.append((tokens[:num_tokens], loss_mask[:num_tokens]))
        cut = slice_of_pack(
            samples,
            padded_length=length,
            cp_degree=tier.cp_degree,
            cp_rank=self.rank - pack.rank0,
            zigzag=tier.is_zigzag,
        )
        return self._micro_batch(step, slot, pack.tier, pack.sample_ids, cut, tier, self.rank - pack.rank0)

    def _dummy(self, step: int, slot: int) -> MicroBatch:
        """A micro-batch without supervised tokens: equal counts on all ranks, no weight in the loss, CP degree 1."""
        length = self.local_tokens(step, slot)
        cut = slice_of_pack([], padded_length=length, cp_degree=1, cp_rank=0)
        alone = Tier(packing_length=length, exchange="a2a", kernel=self.tiers[0].kernel)
        return self._micro_batch(step, slot, DUMMY, np.zeros(0, np.int64), cut, alone, 0)

    def _recompute(self, step: int, slot: int, tier: int) -> Recompute:
        """This rank's policy in a slot; ranks of a slot with different tiers may have to agree on one."""
        if not self.joint_recompute:
            return Recompute() if tier == DUMMY else self.plan.tiers[tier].recompute
        packs = self.plan.grid[step, slot]
        tiers = np.unique(self.plan.pack_tier[packs[packs >= 0]])
        return joint_policy([self.plan.tiers[t].recompute for t in tiers])

    def _micro_batch(
        self,
        step: int,
        slot: int,
        tier_index: int,
        sample_ids: np.ndarray,
        cut: PackSlice,
        tier: Tier,
        cp_rank: int,
    ) -> MicroBatch:
        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        assert tier.exchange != AUTO
        cp_group = self.groups.group(tier.cp_degree)
        return MicroBatch(
            step=step,
            slot=slot,
            tier=tier_index,
            sample_ids=sample_ids,
            tokens=on_device(cut.tokens)[None],
            loss_rows=LossRows(
                local=on_device(cut.supervised),
                labels=on_device(cut.labels),
                rows_to=cut.rows_to,
                rows_from=cut.rows_from,
                cp_group=cp_group,
            ),
            num_local_tokens=int(cut.is_real.sum()),
            context=MicroBatchContext(
                cp_group=cp_group,
                cp_degree=tier.cp_degree,
                position_ids=on_device(cut.position_ids),
                max_seqlen=int(np.diff(cut.cu_seqlens).max()),
                exchange=tier.exchange,
                kernel=tier.kernel,
                split=split_pack(
                    cut.cu_seqlens,
                    num_tokens=int(cut.sample_tokens.sum()),
                    cp_degree=tier.cp_degree,
                    cp_rank=cp_rank,
                    zigzag=tier.is_zigzag,
                    device=self.device,
                ),
                is_real=on_device(cut.is_real),
                sample_index=on_device(cut.sample_index),
                sample_tokens=on_device(cut.sample_tokens),
                sample_supervised=on_device(cut.sample_supervised),
                num_real_tokens=int(cut.sample_tokens.sum()),
                num_supervised_tokens=int(cut.sample_supervised.sum()),
                recompute=self._recompute(step, slot, tier_index),
            ),
        )


def joint_policy(policies: list[Recompute]) -> Recompute:
    """One policy that covers `policies`: full with the most layers if any is full, else the union of their modules.

    Recomputing an MoE layer exchanges its tokens between experts once more. Ranks of an expert-parallel group that
    recompute different layers would wait for each other for ever, so a slot of mixed tiers takes the joint policy.
    """
    layers = max((policy.num_layers for policy in policies), default=0)
    if layers:
        return Recompute(granularity="full", num_layers=layers)
    modules = tuple(sorted({name for policy in policies for name in policy.modules}))
    return Recompute(granularity="selective", modules=modules) if modules else Recompute()
