"""Many planners on one data set, under one cost model."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics
from megatron_hbp.planning.measure.quality import Randomness, randomness
from megatron_hbp.planning.peers import PEERS
from megatron_hbp.planning.planner import planners
from megatron_hbp.planning.request import Planner, Request


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What one planner made of the data."""

    name: str
    plan: Plan
    metrics: PlanMetrics
    randomness: Randomness
    planning_seconds: float


def contenders() -> dict[str, Planner]:
    """Ours, the paper's, peers, and packing methods in one tier, by name."""
    found = planners()
    in_one_tier = {name: found.pop(name) for name in list(found) if name.startswith("one tier")}
    return found | PEERS | in_one_tier


def compare(samples: Samples, request: Request, planners: Mapping[str, Planner]) -> Iterator[Contender]:
    """Run every planner, one after the other."""
    for name, planner in planners.items():
        start = time.perf_counter()
        plan = planner(samples, request)
        seconds = time.perf_counter() - start
        yield Contender(
            name=name,
            plan=plan,
            metrics=plan_metrics(plan, request.cost),
            randomness=randomness(plan),
            planning_seconds=seconds,
        )
