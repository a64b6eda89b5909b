"""Layouts of ranks through `pretrain_hbp.py`: the losses and gradient norms of one rank that runs the same samples.

One rank trains and saves a checkpoint at every step. Every layout starts from the first of them, so also from the same
weights (Megatron-LM draws them by pipeline stage). Layouts with one data-parallel rank have the plan of the one rank,
and resume: the optimizer's state too is cut anew. Those with two have a plan of their own, with CP 2, over the samples
of the same steps; they take the weights only, so their first step is comparable. `coverage.md` of tests/equivalence has
every pair of circumstances in fp64; here the entry point, plan and store on disk and Megatron-LM's loop are tested.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hbp.data.store import TokenStore
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import parse_tiers
from tests.distributed.conftest import Ended, steps_of, write_store
from tests.equivalence.support.plans import plan_of

COMMON = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 8 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8
    --lr 3e-3 --lr-decay-style constant --init-method-std 0.2
"""
# weights ten times as large as by default: else a wrong sum over experts moves the loss by 1e-6 only
MODELS = {
    "dense": shlex.split(f"{COMMON} --group-query-attention --num-query-groups 2"),
    "moe": shlex.split(f"""{COMMON}
        --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4
        --v-head-dim 8 --qk-layernorm --rope-type rope --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16
        --moe-shared-expert-intermediate-size 32 --moe-layer-freq [0]*1+[1]*1 --moe-token-dispatcher-type alltoall
        --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-router-pre-softmax
    """),
}
SAMPLES = ((40, 20, 150, 9), (61, 3, 30, 200), (12, 50, 90, 33))
"""Tokens of the samples of each step."""
TIERS = {1: "64:cp1,256:cp1", 2: "64:cp1:sel=core_attn,256:cp2:full1"}
"""By data-parallel ranks."""
TOLERANCE = {"fp32": (1e-6, 5e-6), "bf16": (1e-2, 5e-2)}
"""Relative, of the loss and of the gradient norm; fp32 layouts have been 0 and 3e-7 apart, bf16 is against fp32."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks are laid out; tensor parallelism brings sequence parallelism with it, unless flags say otherwise."""

    model: str
    ranks: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    flags: str = ""

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.tp * self.pp)

    @property
    def precision(self) -> str:
        return "bf16" if "--bf16" in self.flags else "fp32"

    def words(self) -> list[str]:
        words = [f"--tensor-model-parallel-size={self.tp}", f"--pipeline-model-parallel-size={self.pp}"]
        return [*words, f"--expert-model-parallel-size={self.ep}", *shlex.split(self.flags)]


FAST = {
    "dense TP 2 x PP 2, SP": Layout(model="dense", ranks=4, tp=2, pp=2, flags="--sequence-parallel"),
    "MoE TP 2 x EP 2, SP, distributed optimizer": Layout(
        model="moe", ranks=4, tp=2, ep=2, flags="--sequence-parallel --use-distributed-optimizer"
    ),
}
SLOW = {
    "dense TP 2": Layout(model="dense", ranks=2, tp=2),
    "dense TP 2, SP": Layout(model="dense", ranks=2, tp=2, flags="--sequence-parallel"),
    "dense PP 2": Layout(model="dense", ranks=2, pp=2),
    "dense TP 2, SP, distributed optimizer, bf16": Layout(
        model="dense", ranks=4, tp=2, flags="--sequence-parallel --use-distributed-optimizer --bf16"
    ),
    "MoE EP 2": Layout(model="moe", ranks=2, ep=2),
    "MoE TP 2, SP": Layout(model="moe", ranks=2, tp=2, flags="--sequence-parallel"),
    "MoE TP 2 x EP 2, SP, experts whole, bf16": Layout(
        model="moe", ranks=4, tp=2, ep=2, flags="--sequence-parallel --expert-tensor-parallel-size 1 --bf16"
    ),
    "MoE PP 2 x EP 2, distributed optimizer": Layout(
        model="moe", ranks=4, pp=2, ep=2, flags="--use-distributed-optimizer"
    ),
}
CASES = [pytest.param(layout, id=name) for name, layout in FAST.items()] + [
    pytest.param(layout, id=name, marks=pytest.mark.slow) for name, layout in SLOW.items()
]


def plan_for(num_ranks: int, store: TokenStore, *, first_step: int = 0) -> Plan:
    """The samples of SAMPLES from `first_step` on: a long one alone in a slot, the short ones below each other."""
    tiers, packs = parse_tiers(TIERS[num_ranks]), []
    sample = sum(map(len, SAMPLES[:first_step]))
    for step, lengths in enumerate(SAMPLES[first_step:]):
        slot = place = 0
        for length in lengths:
            if length > tiers[0].packing_length:
                slot, place = slot + (place > 0), 0
                packs.append((step, slot, 0, 1, [sample]))
                slot += 1
            else:
                packs.append((step, slot, place, 0, [sample]))
                slot, place = slot + (place + 1) // num_ranks, (place + 1) % num_ranks
            sample += 1
    plan = plan_of(packs, tiers=tiers, lengths=store.lengths, num_ranks=num_ranks)
    return replace(plan, data=DataFingerprint.of(Samples.of(store.lengths, store_fingerprint=store.fingerprint)))


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Launches, each of which happens once."""

    folder: Path
    one_rank: Callable[[str], list[dict[str, Any]]]
    """Model -> steps of one rank."""
    run: Callable[..., Ended]

    def start(self, name: str, layout: Layout, *flags: object) -> list[dict[str, Any]]:
        """The steps of a layout from the one rank's first checkpoint."""
        plan = "one" if layout.data_parallel == 1 else "two"
        weights_only = () if plan == "one" else ("--finetune",)
        load = ("--load", self.folder / layout.model, "--ckpt-step", 1, *weights_only)
        ended = self.run(name, layout.model, plan, *load, *layout.words(), *flags, ranks=layout.ranks)
        assert ended.code == 0, ended.err[-5000:]
        return steps_of(self.folder / f"{name}.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train) -> Runs:
    """10 s for one rank, 15 for four."""
    folder = tmp_path_factory.mktemp("layouts")
    store = write_store(folder / "store", lengths=np.concatenate(SAMPLES), seed=3)
    planfile.save(plan_for(1, store), folder / "one.plan")
    planfile.save(plan_for(2, store, first_step=1), folder / "two.plan")

    def run(name: str, model: str, plan: str, *flags: object, ranks: int) -> Ended:
        hbp = ("--hbp-plan", folder / f"{plan}.plan", "--hbp-store", folder / "store")
        return train(*hbp, "--hbp-metrics", folder / f"{name}.jsonl", *MODELS[model], *flags, ranks=ranks)

    @cache
    def one_rank(model: str) -> list[dict[str, Any]]:
        ended = run(f"{model}.one", model, "one", "--save", folder / model, "--save-interval", 1, ranks=1)
        assert ended.code == 0, ended.err[-5000:]
        return steps_of(folder / f"{model}.one.jsonl")

    return Runs(folder=folder, one_rank=one_rank, run=run)


def assert_alike(mine: dict[str, Any], yard: dict[str, Any], precision: str) -> None:
    of_loss, of_norm = TOLERANCE[precision]
    assert mine["tokens"] == yard["tokens"]
    assert mine["loss"] == pytest.approx(yard["loss"], rel=of_loss)
    assert mine["grad_norm"] == pytest.approx(yard["grad_norm"], rel=of_norm)


@pytest.mark.parametrize("layout", CASES)
def test_a_layout_goes_on_as_one_rank_does(runs, request, layout):
    yard = runs.one_rank(layout.model)
    steps = runs.start(request.node.callspec.id, layout)

    if layout.data_parallel == 1:
        assert [line["iteration"] for line in steps] == [2, 3]
        for mine, theirs in zip(steps, yard[1:], strict=True):
            assert_alike(mine, theirs, layout.precision)
    else:
        assert [line["cp_degrees"] for line in steps] == [[1, 2], [1, 2]]
        assert_alike(steps[0], yard[1], layout.precision)


def test_steps_of_one_rank_differ_by_more_than_the_tolerance(runs):
    """Else equal losses would show nothing."""
    for model in MODELS:
        losses, norms = (np.array([line[name] for line in runs.one_rank(model)]) for name in ("loss", "grad_norm"))
        assert np.abs(np.diff(losses)).min() > 100 * TOLERANCE["fp32"][0] * losses.max()
        assert np.abs(np.diff(norms)).min() > 10 * TOLERANCE["fp32"][1] * norms.max()


@pytest.mark.slow
def test_one_rank_goes_on_from_a_layout(runs):
    """The way back: TP 2 x PP 2 saves, one rank resumes."""
    layout, saved = FAST["dense TP 2 x PP 2, SP"], runs.folder / "saved by a layout"
    yard = runs.one_rank("dense")
    runs.start("there", layout, "--save", saved, "--save-interval", 1, "--exit-interval", 2)
    ended = runs.run("back", "dense", "one", "--load", saved, ranks=1)
    assert ended.code == 0, ended.err[-5000:]
    (last,) = steps_of(runs.folder / "back.jsonl")
    assert last["iteration"] == 3
    assert_alike(last, yard[2], "fp32")
