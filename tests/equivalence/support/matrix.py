"""Runs on 4, 6, 8 or 16 gloo ranks: the cases of `factors` for so many ranks; on 4 the balance losses besides.

A case trains two optimizer steps of eight samples, packed, against the same layout of ranks training one sample at a
time at CP 1 with Megatron-LM's plain optimizer and no recompute. With the plain optimizer all is fp64: the gradients of
the first step and the parameters after the second. The distributed optimizer refuses doubles and keeps shards of
gradients: fp32, and the parameters only. Under recompute the same packs run once more without it.

Adam divides a gradient by its own size, so where an element is nearly zero (1e-8, Adam's default epsilon) its fp32
rounding (1e-10) moves the parameter by a part of the learning rate, whatever made the rounding. With that epsilon fp32
ended at 5e-5 (dense) and 2e-4 (MoE) for a rate of 1e-2, and 2e-5 for 1e-4, the same figures for both optimizers. So
fp64 shows exactness with the default epsilon and a high rate, and fp32 runs with one well above its rounding, 1e-5.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from megatron_hbp.feed import forward  # noqa: E402
from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.parallel.groups import CpGroups  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from tests.equivalence.support import balance  # noqa: E402
from tests.equivalence.support.factors import Case, cases  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.packs_of_case import LENGTHS, NUM_STEPS, degrees_of, one_by_one, packs_of  # noqa: E402
from tests.equivalence.support.plans import MemoryStore  # noqa: E402
from tests.equivalence.support.stepping import Packs, Stepper, groups_of, laid_out, named_gradients, worst  # noqa: E402

LOCAL_TOKENS = 64
"""Of a pack on each rank, at every degree."""
LEARNING_RATE = {torch.float64: 1e-2, torch.float32: 1e-3}
EPSILON = {torch.float64: 1e-8, torch.float32: 1e-5}
HEADS_FOR_THREE = {
    "dense": {"num_attention_heads": 12, "num_query_groups": 4, "hidden_size": 48},
    "moe": {"num_attention_heads": 12},
}
"""Degrees 3 and 6 must divide the heads."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What two optimizer steps leave behind."""

    gradients: dict[str, torch.Tensor]
    """Of the first step; empty with the distributed optimizer, which keeps shards."""
    parameters: dict[str, torch.Tensor]
    saved_bytes: int
    """What the forwards of all ranks keep for their backwards, parameters not counted, summed over micro-batches."""


def main(part: str, result_path: str) -> None:
    """Write {case: what it gave, numbers by name}, and the balance losses' errors under "balance".

    `part` is FIRST:STEP, which of the cases for so many ranks are run.
    """
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    install_context_capture()
    ranks = dist.get_world_size()
    results: dict[str, dict[str, float]] = {}
    first, step = map(int, part.split(":"))
    for _, of_layout in itertools.groupby(cases(ranks)[first::step], key=lambda case: case.layout):
        alike = list(of_layout)
        _, tp, pp, interleaved, ep = alike[0].layout
        with laid_out(tp=tp, pp=pp, vp=2 if interleaved else None, ep=ep):
            run_layout(alike, results)
    if ranks == 4 and first == 0:
        results["balance"] = balance.errors()
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def run_layout(alike: list[Case], results: dict[str, dict[str, float]]) -> None:
    """Cases of one layout of ranks: a yardstick for each precision."""
    first = alike[0]
    groups = groups_of(sorted({c for case in alike for c in degrees_of(case)} | {1}))
    for optimizer, those in itertools.groupby(alike, key=lambda case: case.optimizer):
        start = time.monotonic()
        # interleaved stages agree on no shapes before they send: Megatron-LM offers varying ones without interleaving
        yard_case = Case(model=first.model, ranks=first.ranks, pp=first.pp, tp=first.tp, ep=first.ep)
        precision = torch.float64 if optimizer == "plain" else torch.float32
        initial = parameters_of(build_for(yard_case, precision))
        yard = train(yard_case, precision, groups, one_by_one(first), [Tier(packing_length=LOCAL_TOKENS)])
        moved = worst(initial, yard.parameters)
        for case in those:
            results[str(case)] = {
                **compare(case, precision, groups, yard), "moved": moved, "seconds": time.monotonic() - start
            }  # fmt: skip
            if dist.get_rank() == 0:
                print(case, json.dumps(results[str(case)]), flush=True)
            start = time.monotonic()


def compare(case: Case, precision: torch.dtype, groups: CpGroups, yard: Trained) -> dict[str, float]:
    """A case against its yardstick, and against itself without recompute."""
    packs = packs_of(case)
    mine = train(case, precision, groups, packs, tiers_of(case))
    found = {"parameters": worst(mine.parameters, yard.parameters)}
    if case.optimizer == "plain":
        found["gradients"] = worst(mine.gradients, yard.gradients)
    if case.recompute != "none":
        kept = train(case, precision, groups, packs, tiers_of(case, recompute=False))
        found["changed by recompute"] = differences(mine, kept)
        found["saved bytes"] = mine.saved_bytes / kept.saved_bytes
    return found


def tiers_of(case: Case, *, recompute: bool = True) -> list[Tier]:
    """Equal local tokens at every degree; full recompute is of one layer a stage, so that not all is recomputed."""
    policy = Recompute()
    if recompute and case.recompute == "full":
        policy = Recompute(granularity="full", num_layers=1)
    elif recompute and case.recompute != "none":
        policy = Recompute(granularity="selective", modules=(case.recompute,))
    return [Tier(packing_length=LOCAL_TOKENS * c, cp_degree=c, recompute=policy) for c in degrees_of(case)]


def build_for(case: Case, precision: torch.dtype) -> list:
    """The chunks of a case's model, the same weights every time."""
    changes: dict[str, Any] = HEADS_FOR_THREE[case.model] if case.data_parallel % 3 == 0 else {}
    return build(
        case.model, dtype=precision, distributed_optimizer=case.optimizer == "distributed", num_layers=4, **changes
    )


def train(case: Case, precision: torch.dtype, groups: CpGroups, packs: Packs, tiers: list[Tier]) -> Trained:
    """Two optimizer steps."""
    chunks = build_for(case, precision)
    distributed = case.optimizer == "distributed"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE[precision], adam_eps=EPSILON[precision], weight_decay=0.1,
            adam_beta2=0.95, params_dtype=precision, use_distributed_optimizer=distributed,
            clip_grad=0.5 if precision == torch.float32 else 0.0,  # its norm is fp32: no yardstick of 1e-10
        ),
        chunks,
    )  # fmt: skip
    stepper = Stepper(chunks, MemoryStore.random(LENGTHS, vocabulary=VOCABULARY), groups)
    saved = SavedBytes(chunks)
    gradients: dict[str, torch.Tensor] = {}
    fixed = case.interleaved or case.packs == "padding"
    for step in stepper.steps(packs, tiers, fixed_shapes=fixed, forward_step=saved.forward_step):
        if step == 0 and not distributed:
            gradients = named_gradients(chunks)
        updated, *_ = optimizer.step()
        assert updated
        optimizer.zero_grad()
    assert step == NUM_STEPS - 1
    return Trained(gradients=gradients, parameters=parameters_of(chunks), saved_bytes=saved.everywhere())


class SavedBytes:
    """A forward step that counts what is kept for the backward."""

    def __init__(self, chunks: list):
        self._total = 0
        self._forward_step = forward.make_forward_step()
        self._parameters = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}

    def forward_step(self, *args: Any) -> Any:
        """Megatron-LM's signature."""
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = self._forward_step(*args)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        self._total += sum(size for pointer, size in sizes.items() if pointer not in self._parameters)
        return result

    def everywhere(self) -> int:
        """Summed over the ranks."""
        total = torch.tensor(self._total)
        dist.all_reduce(total)
        return int(total)


def parameters_of(chunks: list) -> dict[str, torch.Tensor]:
    """Chunk and parameter name -> a copy of its values."""
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }


def differences(mine: Trained, kept: Trained) -> int:
    """Tensors, over all ranks, that are not equal to the last bit."""
    pairs = [
        (a[name], b[name])
        for a, b in ((mine.gradients, kept.gradients), (mine.parameters, kept.parameters))
        for name in a.keys() | b.keys()
    ]
    count = torch.tensor(sum(not torch.equal(a, b) for a, b in pairs))
    dist.all_reduce(count)
    return int(count)


if __name__ == "__main__":
    main(sys.argv[-2], sys.argv[-1])
