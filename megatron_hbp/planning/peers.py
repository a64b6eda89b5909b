"""Schedules of others, written from their descriptions, as plans: to be compared under the same cost model.

Each takes lengths and a Request and returns a Plan. Those that plan one batch at a time get the same random steps as
our gang schedule, ranks meet only once a step where the request's schedule is "gang".
"""

from dataclasses import replace

import numpy as np

from megatron_hbp.planning.cost import ATTENTION_ONLY
from megatron_hbp.planning.gang import PlaceStep, gang_packs, place_step
from megatron_hbp.planning.layout import Occurrences, Placement, Request, place_lockstep, write_plan
from megatron_hbp.planning.metrics import plan_metrics
from megatron_hbp.planning.packing import isf, karmarkar_karp
from megatron_hbp.planning.packs import Packs, filled_packs
from megatron_hbp.planning.plan import Plan
from megatron_hbp.planning.types import Tier


def batch_plan(lengths: np.ndarray, request: Request, place: PlaceStep) -> Plan:
    """Plan one random step after the other by `place`."""
    occurrences = Occurrences(ids=np.arange(len(lengths)), lengths=lengths)
    packs, placement = gang_packs(occurrences, request, np.random.default_rng(request.seed), place)
    return write_plan(packs, occurrences, placement, request, {})


def static_cp(lengths: np.ndarray, request: Request) -> Plan:
    """One CP degree for everything: random packs (ISF) of the longest tier, whichever setting is fastest.

    Tries the degrees from the longest tier's up to the ranks, with as much recompute as the cost model says is needed.
    """
    occurrences = Occurrences(ids=np.arange(len(lengths)), lengths=lengths)
    longest = request.tiers[-1]
    packs = filled_packs(lengths, (longest,), isf, np.random.default_rng(request.seed))
    plans = []
    degree = longest.cp_degree
    while degree <= min(request.num_ranks, request.cost.max_cp_degree) and request.num_ranks % degree == 0:
        tier = request.cost.with_recompute(Tier(packing_length=longest.packing_length, cp_degree=degree))
        if not request.cost.recompute_layers:  # no profile: the longest tier's setting serves all
            tier = replace(tier, recompute=longest.recompute)
        setting = replace(request, tiers=(tier,), schedule="lockstep")
        placement = place_lockstep(packs, occurrences, setting, np.random.default_rng(request.seed), balanced=False)
        plans.append(write_plan(packs, occurrences, placement, setting, {}))
        degree *= 2
    return min(plans, key=lambda plan: plan_metrics(plan, request.cost).epoch_seconds)


def dynamic_cp(lengths: np.ndarray, request: Request) -> Plan:
    """Megatron's dynamic CP as its development branch describes it: least degree that fits, greedy on s^2 / CP."""

    def place(step: np.ndarray, request: Request) -> tuple[Packs, Placement]:
        return place_step(step, request, widen=False, weigh_by=ATTENTION_ONLY)

    return batch_plan(lengths, request, place)


def skrull(lengths: np.ndarray, request: Request) -> Plan:
    """After Skrull (2505.19609): long samples over the full CP group, short ones local to a rank, balanced on FLOPs."""
    setting = replace(request, tiers=(request.tiers[0], request.tiers[-1]))
    flops = replace(request.cost, micro_batch_seconds=0.0, attention=None)

    def place(step: np.ndarray, request: Request) -> tuple[Packs, Placement]:
        return place_step(step, request, widen=False, weigh_by=flops)

    return batch_plan(lengths, setting, place)


def verl(lengths: np.ndarray, request: Request) -> Plan:
    """After verl: one CP degree, Karmarkar-Karp on 24576 s + s^2 into as many micro-batches as tokens need."""
    longest = request.tiers[-1]
    setting = replace(request, tiers=(longest,))
    gangs = request.num_ranks // longest.cp_degree

    def place(step: np.ndarray, request: Request) -> tuple[Packs, Placement]:
        slots = -(-int(step.sum()) // (gangs * longest.packing_length))
        while True:
            packs = karmarkar_karp(24576.0 * step + step.astype(float) ** 2, slots * gangs)
            if np.bincount(packs, step).max() <= longest.packing_length:
                break
            slots += 1
        load = np.bincount(packs, 24576.0 * step + step.astype(float) ** 2, slots * gangs)
        used = np.flatnonzero(np.bincount(packs, minlength=slots * gangs))
        order = used[np.argsort(-load[used], kind="stable")]
        number = np.full(slots * gangs, -1)
        number[order] = np.arange(len(order))
        index = np.arange(len(order))
        placement = Placement(
            step=np.zeros(len(order), np.int64),
            slot=index // gangs,
            rank0=index % gangs * longest.cp_degree,
            num_micro_batches=np.array([-(-len(order) // gangs)]),
        )
        return Packs(pack_of=number[packs], pack_tier=np.zeros(len(order), np.int64)), placement

    return batch_plan(lengths, setting, place)


PEERS = {
    "static CP, tuned": static_cp,
    "dynamic CP (Megatron dev)": dynamic_cp,
    "Skrull-style": skrull,
    "verl-style (Karmarkar-Karp)": verl,
}
"""Peers that need nothing but numpy."""
