"""Compare all peers and HBP on one set of lengths, under one cost model.

python -m benchmarks.peers.run                                     a generated set of 20,000 samples on 32 ranks
python -m benchmarks.peers.run --lengths lengths.npy --step-tokens 4194304

FlexSP's program takes seconds a micro-batch, so it plans a random part of the set (`--milp-steps` steps); its row is
measured against the lower bound of that part.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import generate
from benchmarks.peers.balanced_cp import balanced_cp
from benchmarks.peers.flexsp import flexsp
from benchmarks.peers.measure import Comparison, compare
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import DEFAULT_COST_MODEL, CostModel, preset
from megatron_hbp.planning.peers.common import UNIT, Peer, cp_degrees, static_degree, tier_of_degree
from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.skrull import joined_packs, skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.peers.verl_kk import verl_kk
from megatron_hbp.planning.planner import Schedule, make_plan
from megatron_hbp.planning.request import Request


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the comparison."""

    name: str
    peer: Peer
    few_steps: bool = False
    """Plans `--milp-steps` steps only."""
    joined: Callable[[Plan], np.ndarray] | None = None
    """Packs that share a forward with the one before, where a peer has such."""


def hbp(
    lengths: np.ndarray,
    *,
    num_ranks: int,
    step_tokens: int,
    unit: int = UNIT,
    cost: CostModel,
    seed: int = 0,
    schedule: Schedule = "lockstep",
) -> Plan:
    """This project with a tier of each CP degree from 1 to the least that holds the longest sample."""
    degrees = cp_degrees(static_degree(lengths, unit, num_ranks))
    tiers = tuple(tier_of_degree(int(degree), unit, cost) for degree in degrees)
    return make_plan(
        Samples.of(lengths),
        Request(tiers=tiers, num_ranks=num_ranks, step_tokens=step_tokens, seed=seed, schedule=schedule, cost=cost),
    )


ENTRIES = (
    Entry(name="static CP, tuned", peer=static_cp),
    Entry(name="static CP, tuned, at most 8", peer=partial(static_cp, max_degree=8)),
    Entry(name="megatron-core 0.19 BalancedCPScheduler, packed", peer=balanced_cp),
    Entry(name="megatron-core 0.19 BalancedCPScheduler, as it runs", peer=partial(balanced_cp, packed=False)),
    Entry(name="Megatron dev default_dynamic_cp", peer=default_dynamic),
    Entry(name="FlexSP (HiGHS)", peer=flexsp, few_steps=True),
    Entry(name="Skrull", peer=skrull, joined=joined_packs),
    Entry(name="verl Karmarkar-Karp", peer=verl_kk),
    Entry(name="HBP lockstep", peer=hbp),
    Entry(name="HBP gang", peer=partial(hbp, schedule="gang")),
)


def run_entry(
    entry: Entry, lengths: np.ndarray, *, num_ranks: int, step_tokens: int, unit: int, cost: CostModel, seed: int,
    milp_steps: int,
) -> Comparison:  # fmt: skip
    """Plan, check and measure."""
    if entry.few_steps:
        order = np.random.default_rng([seed, 2]).permutation(len(lengths))
        lengths = lengths[order[: int(np.searchsorted(np.cumsum(lengths[order]), milp_steps * step_tokens)) + 1]]
    started = time.perf_counter()
    plan = entry.peer(lengths, num_ranks=num_ranks, step_tokens=step_tokens, unit=unit, cost=cost, seed=seed)
    seconds = time.perf_counter() - started
    plan.check()
    assert np.array_equal(np.sort(plan.sample_ids), np.arange(len(lengths))), f"{entry.name}: not every sample once"
    return compare(plan, cost, unit, seconds, entry.joined(plan) if entry.joined else None)


NUMBERS = ("steps", "DBR", "ABR", "PR", "CR", "Ave-T", "idle", "epoch / bound", "with waits", "eta^2", "plan s")
"""Columns of the table after name and schedule."""


def table(rows: dict[str, Comparison], title: str) -> Table:
    """The comparison as a table for the terminal."""
    caption = "idle: at the barriers of the schedule; with waits: gangs also wait for their ranks"
    result = Table(title=title, caption=caption)
    result.add_column("")
    result.add_column("schedule")
    for column in NUMBERS:
        result.add_column(column, justify="right")
    for name, row in rows.items():
        m = row.metrics
        shares = [f"{value:.4f}" for value in (m.dbr, m.abr, m.pr, m.cr)]
        ratios = [f"{value:.4f}" for value in (row.idle, row.over_bound, row.over_bound_with_waits, row.eta_squared)]
        result.add_row(
            name, row.schedule, str(m.num_steps), *shares, f"{m.ave_t:.0f}", *ratios, f"{row.planning_seconds:.1f}"
        )
    return result


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a .npy of token counts; generated without it")
    parser.add_argument("--samples", type=int, default=20_000, help="samples to generate")
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=524_288)
    parser.add_argument("--unit", type=int, default=UNIT, help="tokens that one rank holds")
    parser.add_argument("--cost", default=DEFAULT_COST_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--milp-steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="parts of names to run, all without it")
    args = parser.parse_args()

    if args.lengths:
        lengths = np.load(args.lengths).astype(np.int64)
    else:
        lengths = np.minimum(generate("mix", seed=args.seed, num_samples=args.samples), args.unit * args.ranks)
    cost = preset(args.cost)
    console = Console(width=190)
    rows = {}
    for entry in ENTRIES:
        if args.only and not any(part.lower() in entry.name.lower() for part in args.only):
            continue
        with console.status(entry.name):
            rows[entry.name] = run_entry(
                entry, lengths, num_ranks=args.ranks, step_tokens=args.step_tokens, unit=args.unit, cost=cost,
                seed=args.seed, milp_steps=args.milp_steps,
            )  # fmt: skip
    title = f"{len(lengths):,} samples, {args.ranks} ranks, {args.step_tokens:,} tokens a step, {cost.name}"
    console.print(table(rows, title))


if __name__ == "__main__":
    main()
