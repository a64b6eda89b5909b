"""Each rank reads its own part of the plan: no sampler, no broadcast, no collective in the data path.

Every rank of a gang, every tensor-parallel rank and every pipeline stage maps the same store and cuts out its own
slice, some micro-batches ahead, in a thread. The first process of a node also asks the system for what all ranks of
the node will read next, in the order of the file, so that the others find it in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import PlanError
from megatron_hbp.feed.batch import PackSlice, slice_of_pack
from megatron_hbp.feed.read_ahead import ReadAhead
from megatron_hbp.feed.transfer import on_device, pinned
from megatron_hbp.model.context import MicroBatchContext
from megatron_hbp.model.loss import LossRows
from megatron_hbp.model.split import split_pack
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.exchanges import AUTO
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.slices import padded_length, unit_of
from megatron_hbp.planning.core.tiers import Recompute, Tier

DUMMY = -1
"""Tier index of a micro-batch that the plan leaves empty on a rank."""
STEPS_AHEAD = 2
"""Steps that a node's reader asks for beside the one at hand; one of 1M tokens is 5 MB."""


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
        read_ahead: int = 0,
        node_ranks: Sequence[int] = (),
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
            read_ahead: micro-batches that are prepared in a thread while another one runs; 0 for none, and no thread.
            node_ranks: on one process a node, the data-parallel ranks of the node, to ask for what they will read.
        """
        self.plan, self.store, self.groups, self.rank = plan, store, groups, rank
        self.unit, self.full_length, self.device = unit, full_length, device
        self.tiers = tuple(
            replace(tier, exchange="a2a") if tier.exchange == AUTO else tier for tier in tiers or plan.tiers
        )
        self.joint_recompute = joint_recompute
        self.node_ranks = np.array(node_ranks, np.int64)
        prepared = self._iterate(first_step, cyclic)
        # resuming needs no state of the thread: a feed starts at the first step that has not been trained
        self._ahead = ReadAhead(prepared, read_ahead, prepare_thread=self._prepare_thread) if read_ahead else None
        self._prepared: Iterator[MicroBatch] = self._ahead or prepared

    def __iter__(self) -> "Feed":
        """A feed is its own iterator (Megatron-LM's external dataloader)."""
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch of this rank."""
        return on_device(next(self._prepared), self.device)

    @property
    def waited(self) -> float:
        """Seconds that the consumer has waited for micro-batches that were not ready; 0 without reading ahead."""
        return self._ahead.waited if self._ahead is not None else 0.0

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _prepare_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinning in a new thread would open a context on device 0

    def _iterate(self, first_step: int, cyclic: bool) -> Iterator[MicroBatch]:
        step, asked = first_step, first_step
        while cyclic or step < self.plan.num_steps:
            while len(self.node_ranks) and asked <= step + STEPS_AHEAD:
                self._ask_for(asked)
                asked += 1
            for slot in self.slots(step % self.plan.num_steps):
                yield pinned(self._on_host(step % self.plan.num_steps, slot), self.device)
            step += 1

    def _ask_for(self, step: int) -> None:
        """Have the system read what the ranks of this node need in `step`; steps after the last one need nothing."""
        plan = self.plan
        packs = np.flatnonzero(plan.pack_step == step)
        first, last = plan.pack_rank0[packs], plan.pack_rank0[packs] + plan.pack_cp[packs]
        here = ((self.node_ranks >= first[:, None]) & (self.node_ranks < last[:, None])).any(axis=1)
        spans = [np.arange(plan.pack_offsets[p], plan.pack_offsets[p + 1]) for p in packs[here]]
        if spans:
            self.store.will_need(plan.sample_ids[np.concatenate(spans)])

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
        num_tokens = int(self.plan.pack_tokens[index])
        return padded_length(num_tokens, cp_degree=tier.cp_degree, unit=unit_of(tier, self.unit)) // tier.cp_degree

    def _on_host(self, step: int, slot: int) -> MicroBatch:
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
        assert tier.exchange != AUTO
        cp_group = self.groups.group(tier.cp_degree)
        return MicroBatch(
            step=step,
            slot=slot,
            tier=tier_index,
            sample_ids=sample_ids,
            tokens=torch.from_numpy(cut.tokens)[None],
            loss_rows=LossRows(
                local=torch.from_numpy(cut.supervised),
                labels=torch.from_numpy(cut.labels),
                rows_to=cut.rows_to,
                rows_from=cut.rows_from,
                cp_group=cp_group,
            ),
            num_local_tokens=int(cut.is_real.sum()),
            context=MicroBatchContext(
                tier=replace(tier, recompute=self._recompute(step, slot, tier_index)),
                cp_group=cp_group,
                position_ids=torch.from_numpy(cut.position_ids),
                max_seqlen=int(np.diff(cut.cu_seqlens).max()),
                split=split_pack(
                    cut.cu_seqlens,
                    num_tokens=int(cut.sample_tokens.sum()),
                    cp_degree=tier.cp_degree,
                    cp_rank=cp_rank,
                    zigzag=tier.is_zigzag,
                    device=torch.device("cpu"),
                ),
                is_real=torch.from_numpy(cut.is_real),
                sample_index=torch.from_numpy(cut.sample_index),
                sample_tokens=torch.from_numpy(cut.sample_tokens),
                sample_supervised=torch.from_numpy(cut.sample_supervised),
                num_real_tokens=int(cut.sample_tokens.sum()),
                num_supervised_tokens=int(cut.sample_supervised.sum()),
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
