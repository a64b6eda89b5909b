"""A run that goes on from a checkpoint is the run that never stopped, to the last bit; another plan is refused.

A DeepSeek-V2-style model (MLA, shared and routed experts, EP 2) with the distributed optimizer, CP degrees 1, 2 and 4
and another recompute policy a tier, through the real entry point on 4 gloo ranks.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_hbp.planning.core.plan import Plan
from tests.distributed.conftest import Ended, steps_of, write_plan, write_store

STOP = 4

MODEL = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 8 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8
    --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8
    --qk-layernorm --rope-type rope
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 32
    --moe-layer-freq '[0]*1+[1]*1' --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0 --moe-router-pre-softmax --expert-model-parallel-size 2
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2 --use-distributed-optimizer
""")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What the launches left behind."""

    plan: Plan
    other_plan: Plan
    straight: Ended
    """Saves after STOP steps, and goes on."""
    resumed: Ended
    """From there."""
    refused: Ended
    """From there, with another plan."""
    folder: Path
    run: Callable[..., Ended]

    def steps(self, run: str) -> list[dict]:
        return steps_of(self.folder / f"{run}.jsonl")


def mixes_degrees_on_both_sides(plan: Plan) -> bool:
    """Every CP degree before the stop and after it."""
    halves = (plan.pack_step < STOP, plan.pack_step >= STOP)
    return all({1, 2, 4} == set(plan.pack_cp[half].tolist()) for half in halves)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train) -> Runs:
    """Three launches, 25 to 35 s each."""
    folder = tmp_path_factory.mktemp("resume")
    store = write_store(folder / "store", num_samples=70, seed=3)
    plans = (write_plan(folder / "plan", store, num_ranks=4, seed=seed) for seed in range(30))
    plan = next(plan for plan in plans if mixes_degrees_on_both_sides(plan))
    other_plan = write_plan(folder / "other", store, num_ranks=4, seed=31)

    def run(name: str, *flags: object, plan: str = "plan") -> Ended:
        hbp = ("--hbp-plan", folder / plan, "--hbp-store", folder / "store", "--hbp-metrics", folder / f"{name}.jsonl")
        return train(*hbp, *MODEL, "--log-interval", 1, *flags, ranks=4)

    load = ("--load", folder / "saved", "--ckpt-step", STOP)
    return Runs(
        straight=run("straight", "--save", folder / "saved", "--save-interval", STOP),
        resumed=run("resumed", *load),
        refused=run("refused", *load, plan="other"),
        plan=plan,
        other_plan=other_plan,
        folder=folder,
        run=run,
    )


def test_a_run_takes_every_step_of_the_plan(runs):
    assert runs.straight.code == 0, runs.straight.err[-3000:]
    steps = runs.steps("straight")
    assert [line["iteration"] for line in steps] == list(range(1, runs.plan.num_steps + 1))
    assert sum(line["tokens"] for line in steps) == int(runs.plan.pack_tokens.sum())
    assert len({line["loss"] for line in steps}) == len(steps)


def test_megatrons_own_count_of_samples_is_the_plans(runs):
    """In its log, and so in the checkpoint that the resumed run has gone on from."""
    first_packs = np.searchsorted(runs.plan.pack_step, range(1, runs.plan.num_steps + 1))
    samples = runs.plan.pack_offsets[first_packs].tolist()
    for run, steps in (("straight", samples), ("resumed", samples[STOP:])):
        counted = re.findall(r"consumed samples: +(\d+) ", getattr(runs, run).out)
        assert list(map(int, counted)) == steps


def test_the_record_of_the_run_lies_beside_its_checkpoints(runs):
    record = json.loads((runs.folder / "saved" / "run.json").read_text())
    (plan,) = record["plans"]
    assert plan["plan_hash"] == runs.plan.hash and plan["tiers"][2] == "256:cp4:full1:exchange=a2a"
    assert record["layout"]["expert_parallel"] == 2 and record["options"]["hbp_plan"] == str(runs.folder / "plan")
    assert record["megatron_lm"]["kv_lora_rank"] == 16 and "seed" not in record["megatron_lm"]


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_stops(runs):
    saved = runs.folder / "stopped"
    stopped = runs.run("stopped", "--save", saved, "--save-interval", STOP, "--exit-interval", STOP)
    assert stopped.code == 0, stopped.err[-3000:]
    assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == str(STOP)
    assert numbers(runs.steps("stopped")) == numbers(runs.steps("straight")[:STOP])


def test_the_resumed_run_is_the_straight_one(runs):
    assert runs.resumed.code == 0, runs.resumed.err[-3000:]
    assert numbers(runs.steps("resumed")) == numbers(runs.steps("straight")[STOP:])


def test_another_plan_is_refused_in_one_line(runs):
    assert runs.refused.code == 78, runs.refused.err[-3000:]
    messages = runs.refused.messages()
    assert len(messages) == 1, runs.refused.err[-3000:]
    for line in messages:
        assert runs.plan.hash[:12] in line and runs.other_plan.hash[:12] in line
        assert str(runs.folder / "saved") in line
    assert "Traceback" not in runs.refused.out + runs.refused.err
    assert not (runs.folder / "refused.jsonl").exists()


def numbers(steps: list[dict]) -> list[tuple]:
    """What two runs must agree in, to the last bit."""
    return [
        (line["iteration"], line["loss"].hex(), line["grad_norm"].hex(), line["learning_rate"], line["tokens"])
        for line in steps
    ]
