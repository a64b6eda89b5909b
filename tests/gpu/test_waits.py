"""On a CUDA device torch itself says which calls wait for it: after the first step none is ours."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.tiers import Recompute, Tier
from tests.blame import caller
from tests.equivalence.support.plans import MemoryStore, plan_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [170, 400, 230, 600, 330, 90, 310, 250]
TIERS = (
    Tier(packing_length=1024),
    Tier(packing_length=2048, recompute=Recompute(granularity="full", num_layers=1)),
    Tier(packing_length=4096, recompute=Recompute(granularity="selective", modules=("core_attn",))),
)
PACKS = [(step, slot, 0, slot, ids) for step in range(3) for slot, ids in enumerate(([0, 1], [2, 3, 4], [5, 6, 7]))]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Iterator[None]:
    from megatron.core import parallel_state

    store = dist.FileStore(str(tmp_path_factory.mktemp("gpu") / Path("store")), 1)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_no_call_of_ours_waits(one_rank, kind):
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_hbp.feed.feed import Feed
    from megatron_hbp.feed.forward import make_forward_step
    from megatron_hbp.model import context
    from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture
    from tests.equivalence.support.models import VOCABULARY, build

    install_context_capture()
    chunks = build(kind, dtype=torch.bfloat16, hidden_size=128, max_length=4096, use_cpu_initialization=False)
    store = MemoryStore.random(LENGTHS, vocabulary=VOCABULARY)
    feed = Feed(
        plan=plan_of(PACKS, tiers=TIERS, lengths=store.lengths, num_ranks=1), store=store,  # type: ignore[arg-type]
        groups=CpGroups(by_degree={}, num_created=0), rank=0, unit=1, full_length=False,
        device=torch.device("cuda", 0), read_ahead=2,
    )  # fmt: skip
    ours: Counter[str] = Counter()

    def seen(message, *_, **__) -> None:
        found = caller(sys._getframe(1))
        if "synchronizing CUDA operation" in str(message) and found and found[0]:
            ours[found[1]] += 1

    for step in range(3):
        chunks[0].zero_grad_buffer()
        with warnings.catch_warnings(), context.on_bind(RecomputeSwitch(chunks)):
            warnings.simplefilter("always")
            warnings.showwarning = seen
            torch.cuda.set_sync_debug_mode("warn" if step else "default")
            try:
                get_forward_backward_func()(
                    forward_step_func=make_forward_step(), data_iterator=feed, model=chunks,
                    num_microbatches=len(feed.slots(step)), seq_length=4096, micro_batch_size=1, forward_only=False,
                )  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
    feed.close()
    assert ours == {}
