"""Time every pack of a plan that the fit never saw, and set it beside what the cost model says."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_hbp.errors import PlanError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.json_files import write_json
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.profiling.measure import DoesNotFitError, RanksStuckError, gangs_by_rank, time_repeats
from megatron_hbp.profiling.progress import track_items
from megatron_hbp.profiling.session import Session
from megatron_hbp.report.profile_tables import print_check

REPEATS = 11
KIND = "hbp profile check"


def load_plan(session: Session, path: Path) -> Plan:
    """The plan to check. Raises PlanError where it is for other ranks, or has a CP degree that is not measured."""
    plan = planfile.load(path)
    if plan.num_ranks != session.num_ranks:
        raise PlanError(
            f"--hbp-profile-check {path} is for {plan.num_ranks} data-parallel ranks, this run has "
            f"{session.num_ranks}: make it again with `hbp plan --ranks {session.num_ranks}`"
        )
    missing = sorted({tier.cp_degree for tier in plan.tiers} - {1} - set(session.groups.by_degree))
    if missing:
        raise PlanError(f"--hbp-profile-check {path} has CP degree {missing[0]}: add it to --hbp-profile-cp")
    return plan


def check_plan(session: Session, plan: Plan, path: Path, cost: CostModel) -> None:
    """Run every slot of the plan of `path` `REPEATS` times; rank 0 writes and prints. Collective.

    Raises:
        PlanError: the plan does not fit into memory.
    """
    # not those of dummy micro-batches alone
    slots = sorted(set(zip(plan.pack_step.tolist(), plan.pack_slot.tolist(), strict=True)))
    times: dict[tuple[int, int], list[float]] = {at: [] for at in slots}
    # all slots in turn, and again: repeats in a row would share the machine's mood
    for turn, at in track_items(
        [(turn, at) for turn in range(REPEATS + 1) for at in slots], "checking the plan's packs"
    ):
        try:
            (seconds,) = time_repeats(session, session.feed(_slot(plan, *at)), repeats=1)
        except (DoesNotFitError, RanksStuckError) as error:
            raise PlanError(f"--hbp-profile-check {path}: step {at[0]}, slot {at[1]} does not fit") from error
        if turn:  # the first one warms up
            times[at].append(seconds)
    measured = np.zeros(plan.num_packs)
    for step, slot in slots:
        ranks = gangs_by_rank(session, times[step, slot])
        for pack in np.flatnonzero((plan.pack_step == step) & (plan.pack_slot == slot)):
            first = int(plan.pack_rank0[pack])
            measured[pack] = ranks[first : first + int(plan.pack_cp[pack])].max()
    if dist.get_rank():
        return
    # a cost model prices an exchange that a tier leaves open as a2a; what ran is the profile's
    tiers = [replace(tier, exchange=session.header.exchange) for tier in plan.tiers]
    predicted = cost.pack_seconds(tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    rows = [
        {"tier": str(plan.tiers[plan.pack_tier[i]]), "tokens": int(plan.pack_tokens[i]),
         "squares": int(plan.pack_squares[i]), "samples": int(plan.pack_offsets[i + 1] - plan.pack_offsets[i]),
         "predicted": float(predicted[i]), "measured": float(measured[i])}
        for i in range(plan.num_packs)
    ]  # fmt: skip
    target = session.options.out.with_name(f"{session.options.out.name.removesuffix('.json')}.check.json")
    values = {"kind": KIND, "version": 1, "plan": str(path), "plan_hash": plan.hash, "packs": rows}
    write_json(values, target, "comparison", "--hbp-profile-out")
    print_check(plan, predicted, measured)
    sys.stdout.flush()


def _slot(plan: Plan, step: int, slot: int) -> Plan:
    """The plan of one slot alone: what runs before and after it is not in its time."""
    packs = np.flatnonzero((plan.pack_step == step) & (plan.pack_slot == slot))
    first = np.zeros(len(packs), np.int64)
    return plan.subset(packs, step=first, slot=first, rank0=plan.pack_rank0[packs], schedule="lockstep")
