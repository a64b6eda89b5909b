"""Micro-batches of one rank, made by the feed itself."""

from collections.abc import Sequence

import torch

from megatron_hbp.feed.feed import Feed, MicroBatch
from megatron_hbp.model.context import MicroBatchContext
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Recompute, Tier
from tests.equivalence.support.plans import MemoryStore, plan_of


def micro_batch_of(
    lengths: Sequence[int], *, recompute: Recompute | None = None, vocabulary: int = 64, seed: int = 0
) -> MicroBatch:
    """One pack of random samples of these lengths at CP degree 1, unpadded."""
    store = MemoryStore.random(lengths, vocabulary=vocabulary, seed=seed)
    tier = Tier(packing_length=sum(lengths), recompute=recompute or Recompute())
    plan = plan_of([(0, 0, 0, 0, range(len(lengths)))], tiers=[tier], lengths=store.lengths, num_ranks=1)
    feed = Feed(
        plan=plan, store=store, groups=CpGroups(by_degree={}, num_created=0), rank=0, unit=1, full_length=False,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )  # fmt: skip
    return next(feed)


def context_of(lengths: Sequence[int], *, recompute: Recompute | None = None) -> MicroBatchContext:
    """The context of such a micro-batch."""
    return micro_batch_of(lengths, recompute=recompute).context
