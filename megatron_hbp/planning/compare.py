"""Many planners on one data set, under one cost model."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics
from megatron_hbp.planning.measure.quality import Randomness, randomness
from megatron_hbp.planning.packing.methods import METHODS, PackingMethod
from megatron_hbp.planning.peers import PEERS, Planner
from megatron_hbp.planning.planner import Schedule, make_plan, method_plan
from megatron_hbp.planning.schedule.placement import Request


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What one planner made of the data."""

    name: str
    plan: Plan
    metrics: PlanMetrics
    randomness: Randomness
    planning_seconds: float


def contenders() -> dict[str, Planner]:
    """All planners of this package by name: ours, the paper's, packing methods in one tier, and peers."""
    ours = {"HBP, lockstep": _ours("lockstep"), "HBP, gang": _ours("gang")}
    paper = {
        "HBP as in the paper": _method("ISF", balanced=True, hierarchical=True),
        "hierarchical, not balanced": _method("ISF", balanced=False, hierarchical=True),
    }
    single = {f"one tier, {name}": _method(name, balanced=False, hierarchical=False) for name in METHODS}
    return ours | paper | PEERS | single


def compare(lengths: np.ndarray, request: Request, planners: dict[str, Planner]) -> Iterator[Contender]:
    """Run every planner, one after the other."""
    for name, planner in planners.items():
        start = time.perf_counter()
        plan = planner(lengths, request)
        seconds = time.perf_counter() - start
        yield Contender(
            name=name,
            plan=plan,
            metrics=plan_metrics(plan, request.cost),
            randomness=randomness(plan),
            planning_seconds=seconds,
        )


def _ours(schedule: Schedule) -> Planner:
    def planner(lengths: np.ndarray, request: Request) -> Plan:
        return make_plan(
            lengths, tiers=request.tiers, num_ranks=request.num_ranks, step_tokens=request.step_tokens,
            seed=request.seed, cost=request.cost, schedule=schedule,
        )  # fmt: skip

    return planner


def _method(name: str, *, balanced: bool, hierarchical: bool) -> Planner:
    method: PackingMethod = METHODS[name]

    def planner(lengths: np.ndarray, request: Request) -> Plan:
        setting = request if hierarchical else replace(request, tiers=request.tiers[-1:])
        return method_plan(
            lengths, tiers=setting.tiers, num_ranks=setting.num_ranks, step_tokens=setting.step_tokens,
            seed=setting.seed, cost=setting.cost, method=method, balanced=balanced,
        )  # fmt: skip

    return planner
