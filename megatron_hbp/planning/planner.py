"""make_plan: samples and a request become a Plan.

samples --group--> tiers --pack, fill--> packs --balance--> slots --shuffle--> steps --even out--> Plan
"""

from dataclasses import replace

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.packing.hierarchical import balanced_packs, filled_packs
from megatron_hbp.planning.packing.methods import METHODS, packing_method
from megatron_hbp.planning.request import OUR_PACKING, Planner, Request, Schedule, occurrences
from megatron_hbp.planning.schedule.gang import gang_packs
from megatron_hbp.planning.schedule.loss_tokens import balance_loss_tokens
from megatron_hbp.planning.schedule.placement import place_lockstep, write_plan


def make_plan(samples: Samples, request: Request) -> Plan:
    """Plan one epoch. Raises ConfigError and DataError."""
    planned, rng = occurrences(samples, request), np.random.default_rng(request.seed)
    if request.schedule == "gang":
        packs, placement = gang_packs(planned, request, rng)
    else:
        if request.packing == OUR_PACKING:
            packs = balanced_packs(planned.lengths, request.tiers, request.num_ranks, rng)
        else:
            packs = filled_packs(planned.lengths, request.tiers, packing_method(request.packing), rng)
        placement = place_lockstep(packs, planned, request, rng)
    if request.packing == OUR_PACKING:
        packs = balance_loss_tokens(packs, planned, placement, request)
    return write_plan(packs, planned, placement, request, samples)


def naive_plan(samples: Samples, request: Request) -> Plan:
    """Everything packed (ISF) into the longest tier, packs in random order: what HBP is compared with."""
    return make_plan(samples, naive_request(request))


def naive_request(request: Request) -> Request:
    """`request` for `naive_plan`."""
    return replace(
        request, tiers=request.tiers[-1:], packing="ISF", is_balanced=False, schedule="lockstep", curriculum_steps=0,
        slot_multiple=1,
    )  # fmt: skip


def planners() -> dict[str, Planner]:
    """The planners of this package by name: ours, the paper's, and every packing method in one tier."""
    found: dict[str, Planner] = {f"HBP, {schedule}": _scheduled(schedule) for schedule in ("lockstep", "gang")}
    found["HBP as in the paper"] = _packed("ISF", hierarchical=True, balanced=True)
    found["hierarchical, not balanced"] = _packed("ISF", hierarchical=True, balanced=False)
    return found | {f"one tier, {name}": _packed(name, hierarchical=False, balanced=False) for name in METHODS}


def _scheduled(schedule: Schedule) -> Planner:
    return lambda samples, request: make_plan(samples, replace(request, schedule=schedule))


def _packed(name: str, *, hierarchical: bool, balanced: bool) -> Planner:
    def planner(samples: Samples, request: Request) -> Plan:
        tiers = request.tiers if hierarchical else request.tiers[-1:]
        return make_plan(
            samples, replace(request, tiers=tiers, packing=name, is_balanced=balanced, schedule="lockstep")
        )

    return planner
