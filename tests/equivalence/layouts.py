"""Runs on 4, 6 or 8 gloo ranks: dynamic CP under tensor, pipeline and expert parallelism, recompute, balance losses.

Every case compares a step of packs with mixed CP degrees with the same layout of ranks training one sample at a time at
CP 1 (balance losses: with the same packs at CP 1, since they are defined over packs). fp64; see stepping.worst.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402

from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.planning.types import Recompute, Tier  # noqa: E402
from tests.equivalence.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.plans import MemoryStore  # noqa: E402
from tests.equivalence.stepping import Packs, Stepper, alone, worst  # noqa: E402

LENGTHS = [17, 5, 1, 40, 23, 2, 31, 9, 60, 33, 3, 12, 90, 70, 11, 8, 25, 50, 14, 64]
ALONE = (Tier(packing_length=128),)


def local_tokens() -> int:
    """Tokens of a rank in every tier; where no two ranks can share a pack, enough for the longest sample."""
    return 128 if parallel_state.get_data_parallel_world_size() == 1 else 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks are laid out, and which model they train."""

    kind: str
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    ep: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        vp = f" vp{self.vp}" if self.vp else ""
        return f"{self.kind} tp{self.tp} pp{self.pp}{vp} ep{self.ep} dp{dist.get_world_size() // self.tp // self.pp}"


FOUR = (
    Layout(kind="dense", tp=2),
    Layout(kind="moe", tp=2),
    Layout(kind="moe", tp=2, ep=2),
    Layout(kind="moe", tp=2, ep=4),
    Layout(kind="dense", pp=2),
    Layout(kind="moe", pp=2, ep=2),
    Layout(kind="dense", pp=2, vp=2),
    Layout(kind="moe", pp=2, vp=2),
    Layout(kind="dense", pp=4),
    Layout(kind="moe", tp=2, pp=2, ep=2),
)
EIGHT = (
    Layout(kind="dense"),
    Layout(kind="moe", ep=4),
    Layout(kind="moe", tp=2, pp=2, ep=2),
    Layout(kind="dense", tp=2, pp=2),
    Layout(kind="dense", pp=4),
    Layout(kind="moe", pp=4, ep=2),
    Layout(kind="dense", tp=2, pp=2, vp=2),
    Layout(kind="moe", pp=2, ep=4),
    Layout(kind="moe", tp=2, ep=4),
)
SIX = (
    Layout(kind="dense", changes={"num_attention_heads": 12, "num_query_groups": 4, "hidden_size": 48}),
    Layout(kind="moe", changes={"num_attention_heads": 12}),
)


def main(which: str, result_path: str) -> None:
    """Run the layouts for this number of ranks and write {case: relative error}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    install_context_capture()
    results: dict[str, float] = {}
    for layout in {"four": FOUR, "six": SIX, "eight": EIGHT}[which]:
        with_layout(layout, results)
        if dist.get_rank() == 0:
            print(json.dumps(results), flush=True)
    if which == "four":
        balance_losses(results)
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def degrees() -> list[int]:
    """CP degrees that the data-parallel ranks allow."""
    size = parallel_state.get_data_parallel_world_size()
    return [c for c in (1, 2, 3, 4, 6, 8) if size % c == 0]


def tiers_of(recompute: Recompute = Recompute()) -> tuple[Tier, ...]:
    """Equal local tokens at every degree."""
    return tuple(Tier(packing_length=local_tokens() * c, cp_degree=c, recompute=recompute) for c in degrees())


def mixed_packs(num_ranks: int) -> Packs:
    """All samples: every degree has a slot of its own; the last slot of a round has one gang, the others idle."""
    left = list(range(len(LENGTHS)))
    packs: list[tuple[int, int, int, int, list[int]]] = []

    def take(room: int) -> list[int]:
        taken: list[int] = []
        for i in list(left):
            if LENGTHS[i] <= room:
                taken.append(i)
                left.remove(i)
                room -= LENGTHS[i]
        return taken

    slot = 0
    every = list(enumerate(degrees()))
    while left:
        for tier, c in reversed(every):
            for rank0 in range(0, num_ranks, c):
                if slot % (len(every) + 1) == len(every) and rank0 >= c:
                    continue  # the last slot of a round: one gang only, the other ranks idle
                if taken := take(local_tokens() * c):
                    packs.append((0, slot, rank0, tier, taken))
            slot += 1
    return packs


def rounded(packs: Packs, multiple: int) -> Packs:
    """Interleaved pipelines want a number of micro-batches that PP divides: samples of one pack go to more slots."""
    slots = 1 + max(p[1] for p in packs)
    short = -slots % multiple
    if not short:
        return packs
    *rest, last = sorted(packs, key=lambda p: len(p[4]))
    moved = [(0, slots + i, last[2], last[3], [last[4][i]]) for i in range(short)]
    return [*rest, (*last[:4], last[4][short:]), *moved]


def with_layout(layout: Layout, results: dict[str, float]) -> None:
    """Packs against single samples under one layout, shapes fixed and varying, recompute none, full and selective."""
    for stepper in _steppers(layout, {"num_layers": 4, **layout.changes}):
        multiple = layout.pp if layout.vp else 1
        packs = rounded(mixed_packs(stepper.num_ranks), multiple)
        singles = rounded_singles(stepper.num_ranks, multiple)
        # interleaved stages agree on no shapes before they send: Megatron-LM offers varying ones without interleaving
        fixed = layout.vp is not None
        yard = stepper.gradients(singles, ALONE, fixed_shapes=fixed)
        policies = {
            "none": Recompute(),
            "full": Recompute(granularity="full", num_layers=1),
            "selective": Recompute(granularity="selective", modules=("core_attn", "layernorm")),
        }
        for name, policy in policies.items():
            mine = stepper.gradients(packs, tiers_of(policy), fixed_shapes=fixed)
            results[f"{layout} recompute={name}{' fixed shapes' * fixed}"] = worst(mine, yard)
        if layout.pp > 1 and not fixed:
            mine = stepper.gradients(packs, tiers_of(), fixed_shapes=True)
            results[f"{layout} recompute=none fixed shapes"] = worst(mine, yard)


def rounded_singles(num_ranks: int, multiple: int) -> Packs:
    """One sample a pack, over a number of slots that `multiple` divides."""
    singles = alone(len(LENGTHS), num_ranks)
    slots = 1 + singles[-1][1]
    spread = slots + -slots % multiple
    return [(0, i % spread, i // spread, 0, [i]) for i in range(len(LENGTHS))]


def balance_losses(results: dict[str, float]) -> None:
    """Mixed degrees and other padding leave the balance losses as they are at CP 1."""
    for name, changes in {
        "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
        "z_loss": {"moe_z_loss_coeff": 0.1},
    }.items():
        for layout in (Layout(kind="moe", ep=2), Layout(kind="moe", tp=2)):
            for stepper in _steppers(layout, {"num_layers": 2, **changes}):
                packs = mixed_packs(stepper.num_ranks)
                at_cp1 = [
                    (0, slot, rank0, tier, samples) for slot, (_, _, rank0, tier, samples) in enumerate(sorted(packs))
                ]
                one = tuple(Tier(packing_length=local_tokens() * c) for c in degrees())
                yard = stepper.gradients(at_cp1, one)
                results[f"{layout} {name}"] = worst(stepper.gradients(packs, tiers_of()), yard)
                results[f"{layout} {name}, padded"] = worst(stepper.gradients(packs, tiers_of(), extra_unit=8), yard)
            for stepper in _steppers(layout, {"num_layers": 2}):
                without = stepper.gradients(packs, tiers_of())
                results[f"{layout} {name} matters"] = worst(without, yard)


def _steppers(layout: Layout, changes: dict[str, Any]) -> Iterator[Stepper]:
    """One stepper, and the layout undone after its use."""
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1
    )
    store = MemoryStore.random(LENGTHS, vocabulary=VOCABULARY)
    yield Stepper(build(layout.kind, **changes), store, degrees())
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main(sys.argv[-2], sys.argv[-1])
