"""Gang schedules on 4 gloo ranks: unequal counts, CP degrees 1, 2, 4 side by side, one meeting a step. fp64, dense.

Judged by Megatron-LM's *own* model, untouched, that sees one unpadded sample at a time, and by a lockstep plan of the
same packs. Two steps with an update of the weights between them. Results: {case: largest relative error of a gradient},
and what the check before the first step says on each rank.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402

from megatron_hbp.errors import PlanError  # noqa: E402
from megatron_hbp.feed import batch, feed  # noqa: E402
from megatron_hbp.feed.agreement import check_orders, check_same_plans  # noqa: E402
from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.planning.core.plan import Plan  # noqa: E402
from megatron_hbp.planning.core.tiers import Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402
from tests.equivalence.support.stepping import Packs, Stepper, alone, groups_of, laid_out, named_gradients, worst  # noqa: E402

LENGTHS = [17, 5, 40, 60, 1, 33, 70, 9, 31, 2, 25, 50, 14, 23, 12, 3, 8, 11]
TIERS = (Tier(packing_length=64), Tier(packing_length=128, cp_degree=2), Tier(packing_length=256, cp_degree=4))
# (step, slot, rank0, tier, samples). Step 0: ranks 0 and 1 share a pack, then all four, then 0 and 1 again beside
# single ranks: 4, 3, 3 and 2 micro-batches. Step 1: 4, 0, 2 and 2, so rank 1 comes with a dummy.
PACKS = [
    (0, 0, 0, 1, [0, 3]), (0, 0, 2, 0, [1, 2]),
    (0, 1, 0, 2, [6]),
    (0, 2, 0, 1, [5]), (0, 2, 2, 0, [4]), (0, 2, 3, 0, [8]),
    (0, 3, 0, 0, [7]),
    (1, 0, 0, 0, [9, 13]), (1, 0, 2, 1, [11, 12]),
    (1, 1, 0, 0, [10]), (1, 1, 3, 0, [14]),
    (1, 2, 0, 0, [15]), (1, 2, 2, 0, [16]),
    (1, 3, 0, 0, [17]),
]  # fmt: skip
# 2 data-parallel ranks under TP 2: 3 and 2 micro-batches, then 2 and a dummy
PACKS_TP2 = [
    (0, 0, 0, 1, [0, 3]), (0, 1, 0, 0, [1, 2]), (0, 1, 1, 0, [5]), (0, 2, 0, 0, [4, 8]),
    (1, 0, 0, 0, [9, 13]), (1, 1, 0, 0, [10]),
]  # fmt: skip
# rank 3 has no pack in step 0, and one of its own in step 1
PACKS_IDLE = [(0, 0, 0, 1, [0, 3]), (0, 0, 2, 0, [1]), (0, 1, 0, 0, [2]), (1, 0, 3, 0, [5])]
RATE = 0.1
"""Learning rate of the update between the steps."""
Gradients = dict[str, torch.Tensor]


def main(result_path: str) -> None:
    """Run every case and write the results."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    install_context_capture()
    store = MemoryStore.random(LENGTHS, vocabulary=VOCABULARY)
    results: dict[str, Any] = {}
    with laid_out():
        groups = groups_of((2, 4))
        yard = one_at_a_time(store, PACKS)
        gang = trained(store, groups, PACKS, "gang")
        lockstep = trained(store, groups, PACKS, "lockstep")
        for step in range(2):
            results[f"step {step}: gang, one sample at a time"] = worst(gang[step], yard[step])
            results[f"step {step}: gang, lockstep"] = worst(gang[step], lockstep[step])
        idle = one_at_a_time(store, PACKS_IDLE, steps=1)[0]
        for name, breakage in BREAKAGES.items():
            with breakage():
                broken = trained(store, groups, PACKS_IDLE, "gang", steps=1, extra_unit=4)[0]
            results[f"idle rank: {name}"] = worst(broken, idle)
        results["agreement"] = {name: _everywhere(_answer(name, store, groups)) for name in AGREEMENT}
        plan = _plan(store)
        mine = [len(_feed(plan, store, groups).slots(step)) for step in range(2)]
        results["counts"] = [list(counts) for counts in zip(*_everywhere(mine), strict=True)]
    with laid_out(tp=2):
        groups = groups_of((2,))
        single = [[(step, *pack[1:]) for pack in _one_each(PACKS_TP2, step, 2)] for step in range(2)]
        yard = trained(store, groups, [pack for packs in single for pack in packs], "lockstep")
        gang = trained(store, groups, PACKS_TP2, "gang")
        for step in range(2):
            results[f"step {step}: gang, one sample at a time, TP 2"] = worst(gang[step], yard[step])
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def trained(
    store: MemoryStore, groups: Any, packs: Packs, schedule: str, *, steps: int = 2, extra_unit: int = 1
) -> list[Gradients]:
    """Gradients of each step; the weights are updated after it."""
    chunks = build("dense")
    stepper = Stepper(chunks, store, groups)
    found = []
    for _ in stepper.steps(packs, TIERS, schedule=schedule, extra_unit=extra_unit):
        found.append(_updated(chunks))
        if len(found) == steps:
            break
    return found


def one_at_a_time(store: MemoryStore, packs: Packs, *, steps: int = 2) -> list[Gradients]:
    """Gradients of the mean token loss of each step by Megatron-LM's own model, on every rank the same."""
    chunks = build("dense", packed=False)
    found = []
    for step in range(steps):
        chunks[0].zero_grad_buffer()
        num_tokens = torch.zeros((), dtype=torch.int)
        for sample in _samples(packs, step):
            tokens, mask = store.sample(sample)
            n = len(tokens)
            causal = torch.ones(1, 1, n, n).triu(1).bool()
            logits = chunks[0](torch.from_numpy(tokens)[None], torch.arange(n)[None], causal)
            rows = torch.from_numpy(np.flatnonzero(mask[1:]))
            targets = torch.from_numpy(tokens)[rows + 1]
            losses = torch.nn.functional.cross_entropy(logits[0, rows], targets, reduction="sum")
            (losses / dist.get_world_size()).backward()  # four ranks add up the same gradient: a quarter each
            num_tokens += len(rows)
        # the same division as in training, by a count in fp32 (6e-8)
        finalize_model_grads(chunks, num_tokens if dist.get_rank() == 0 else torch.zeros_like(num_tokens))
        found.append(_updated(chunks))
    return found


def _updated(chunks: list) -> Gradients:
    gradients = named_gradients(chunks)
    with torch.no_grad():
        for parameter in chunks[0].module.parameters():
            parameter -= RATE * parameter.main_grad
    return gradients


def _samples(packs: Packs, step: int) -> list[int]:
    return sorted(sample for pack in packs if pack[0] == step for sample in pack[4])


def _one_each(packs: Packs, step: int, num_ranks: int) -> Packs:
    samples = _samples(packs, step)
    return [(*pack[:4], [samples[i]]) for i, pack in enumerate(alone(len(samples), num_ranks))]


# ------------------------------------------------------------ broken on purpose


@contextlib.contextmanager
def _no_dummy() -> Iterator[None]:
    """A rank without a pack runs no dummy: Megatron-LM's schedule runs one micro-batch at least, the next step's."""
    slots = feed.Feed.slots

    def without(self, step):
        return [slot for slot in slots(self, step) if self.plan.pack_at(step, slot, self.rank) >= 0]

    with mock.patch.object(feed.Feed, "slots", without):
        yield


@contextlib.contextmanager
def _dummy_in_the_loss() -> Iterator[None]:
    """A dummy's tokens are supervised."""

    def supervised(samples, *, padded_length, **kwargs):
        zeros = np.zeros(padded_length, np.int64)
        return cutter(samples or [(zeros, zeros + 1)], padded_length=padded_length, **kwargs)

    cutter = batch.slice_of_pack
    with mock.patch.object(feed, "slice_of_pack", supervised):
        yield


BREAKAGES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "correct code": contextlib.nullcontext,
    "no dummy": _no_dummy,
    "dummy in the loss": _dummy_in_the_loss,
}

# ------------------------------------------------------------ the check before the first step


def _plan(store: MemoryStore) -> Plan:
    return dataclasses.replace(plan_of(PACKS, tiers=TIERS, lengths=store.lengths, num_ranks=4), schedule="gang")


def _feed(plan: Plan, store: MemoryStore, groups: Any) -> feed.Feed:
    return feed.Feed(
        plan=plan, store=store, groups=groups, rank=parallel_state.get_data_parallel_rank(),  # type: ignore[arg-type]
        unit=1, full_length=False, device=torch.device("cpu"),
    )  # fmt: skip


AGREEMENT = {"as planned": None, "another plan": 2, "another order": 1, "a pack left out": 3}
"""What is wrong -> on which rank."""


def _answer(name: str, store: MemoryStore, groups: Any) -> str:
    """The message for this rank; "" where all is well."""
    plan = _plan(store)
    here = dist.get_rank() == AGREEMENT[name]
    if here and name == "another plan":
        plan = dataclasses.replace(plan, seed=1)
    rank_feed = _feed(plan, store, groups)
    slots = rank_feed.slots
    walks = {"another order": lambda step: slots(step)[::-1], "a pack left out": lambda step: slots(step)[1:]}
    if here and name in walks:
        rank_feed.slots = walks[name]  # type: ignore[method-assign]
    try:
        check_same_plans([rank_feed.plan], [TIERS])
        check_orders(rank_feed, parallel_state.get_data_parallel_group())
    except PlanError as refused:
        return str(refused)
    return ""


def _everywhere(mine: Any) -> list[Any]:
    every = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


if __name__ == "__main__":
    main(sys.argv[-1])
