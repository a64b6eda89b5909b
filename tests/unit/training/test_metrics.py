"""What a run writes down, with a clock of our own."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hbp.feed.feed import DUMMY
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.training import metrics
from megatron_hbp.training.metrics import RunMetrics
from tests.equivalence.support.plans import plan_of

TIERS = (Tier(packing_length=8), Tier(packing_length=16, cp_degree=2))


@pytest.fixture
def plan():
    packs = [(0, 0, 0, 0, [0]), (0, 0, 1, 0, [1]), (1, 0, 0, 1, [2]), (1, 1, 1, 0, [3])]
    return plan_of(packs, tiers=TIERS, lengths=np.array([3, 8, 13, 5]), num_ranks=2)


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is what perf_counter answers."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def world(monkeypatch):
    """This process is the last of two ranks; a sum over ranks doubles."""
    world = SimpleNamespace(rank=1)
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: world.rank)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda table, group: table.mul_(2))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    return world


def run_step(run: RunMetrics, clock, micro_batches, *, training: bool = True) -> None:
    """Each micro-batch is (tier, real tokens, seconds)."""
    run.start(training=training)
    for tier, tokens, seconds in micro_batches:
        micro_batch: Any = SimpleNamespace(tier=tier, num_local_tokens=tokens)
        run.observe(micro_batch)
        clock.now += seconds
    run.finish()


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_validation_and_summary(plan, clock, world, tmp_path):
    path = tmp_path / "new" / "m.jsonl"
    run = RunMetrics(plan, path)
    run_step(run, clock, [(0, 3, 1.0)])
    clock.now += 0.25  # the optimizer
    run.log_step(iteration=1, losses={"lm loss": torch.tensor(2.5)}, learning_rate=0.1, grad_norm=torch.tensor(1.5))
    run_step(run, clock, [(1, 7, 2.0), (DUMMY, 0, 0.5)])
    run.log_step(iteration=2, losses={}, learning_rate=None, grad_norm=None)
    run_step(run, clock, [(0, 99, 50.0)], training=False)
    run.log_validation({"lm loss": torch.tensor(3.0)})
    run.summarise(None)  # type: ignore[arg-type]

    first, second, validation, summary = lines_of(path)
    assert first == {
        "kind": "step", "iteration": 1, "steps": 2, "loss": 2.5, "learning_rate": 0.1, "grad_norm": 1.5,
        "tokens": 11, "seconds": 1.25, "cp_degrees": [1],
    }  # fmt: skip
    assert (second["tokens"], second["seconds"], second["cp_degrees"]) == (18, 2.5, [1, 2])
    assert (second["loss"], second["learning_rate"], second["grad_norm"]) == (None, None, None)
    assert validation == {"kind": "validation", "loss": 3.0}
    assert summary == {
        "kind": "summary",
        "tiers": [  # sums over two ranks; evaluation is not in them
            {"tier": "8:cp1", "micro_batches": 2, "tokens": 6, "rank_seconds": 2.0},
            {"tier": "16:cp2", "micro_batches": 2, "tokens": 14, "rank_seconds": 4.0},
            {"tier": "dummy", "micro_batches": 2, "tokens": 0, "rank_seconds": 1.0},
        ],
        "train_tokens": 29,
        "train_seconds": 3.5,
        "plan_hash": plan.hash,
    }


def test_tiers_that_never_ran_are_left_out(plan, clock, world, tmp_path):
    run = RunMetrics(plan, tmp_path / "m")
    run_step(run, clock, [(1, 4, 1.0)])
    run.summarise(None)  # type: ignore[arg-type]
    (summary,) = lines_of(tmp_path / "m")
    assert [tier["tier"] for tier in summary["tiers"]] == ["16:cp2"]


def test_only_the_last_rank_writes(plan, clock, world, tmp_path):
    world.rank = 0
    run = RunMetrics(plan, tmp_path / "m")
    run.log_validation({"lm loss": 1.0})
    run.summarise(None)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_without_a_path_nothing_is_written(plan, clock, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunMetrics(plan, None).log_validation({"lm loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_in_the_same_file(plan, clock, world, tmp_path):
    for loss in (1.0, 2.0):
        RunMetrics(plan, tmp_path / "m").log_validation({"lm loss": loss})
    assert [line["loss"] for line in lines_of(tmp_path / "m")] == [1.0, 2.0]


def test_a_step_on_a_device_is_written_when_the_next_is_known(plan, clock, world, tmp_path, monkeypatch):
    """As on CUDA, where reading the loss at once would wait for the device; a meta tensor stands for one there."""
    copies = []

    def reader(value):
        copies.append(value)
        return lambda: float(len(copies))

    monkeypatch.setattr(metrics, "_reader", reader)
    run = RunMetrics(plan, tmp_path / "m")
    loss = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(metrics.torch, "Tensor", SimpleNamespace)
    run.log_step(iteration=1, losses={"lm loss": loss}, learning_rate=0.1, grad_norm=1.0)
    assert lines_of(tmp_path / "m") == [] and copies == [loss]
    run.log_step(iteration=2, losses={"lm loss": loss}, learning_rate=0.1, grad_norm=1.0)
    assert [line["iteration"] for line in lines_of(tmp_path / "m")] == [1]
    run.log_validation({"lm loss": loss})
    assert [line["kind"] for line in lines_of(tmp_path / "m")] == ["step", "step", "validation"]
