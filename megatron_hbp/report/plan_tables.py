"""Plans as tables for a terminal and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_hbp.planning.compare import Contender
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.memory import memory_of, problem
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics
from megatron_hbp.planning.measure.quality import side_by_side_abr
from megatron_hbp.report.picture import pyplot, save_picture
from megatron_hbp.report.terminal import plain_table

STEP_TOLERANCE = 0.1
"""Share by which steps may be off the tokens asked for before it is said."""

LEGEND = {
    "ABR": "attention balance ratio, mean of (max - own) / max over ranks of summed squared lengths: 0 is balanced",
    "DBR": "data balance ratio, the same of tokens",
    "PR": "padding ratio, padding over token slots",
    "CR": "communication ratio, tokens in packs that ranks share (CP > 1) over all tokens",
    "Ave-T": "tokens per rank and micro-batch",
}
"""The measures of the paper (section 3.1)."""


def legend(names: Sequence[str]) -> str:
    """What the acronyms `names` mean."""
    return "; ".join(f"{name}: {LEGEND[name]}" for name in names)


def tier_table(plan: Plan) -> Table:
    """One row per tier: what it is and what it got."""
    table = plain_table(
        f"Plan {plan.hash[:12]}: {plan.num_steps} steps on {plan.num_ranks} ranks ({plan.schedule})",
        ("tier", "packs", "samples", "tokens", "full", "share of tokens"),
    )
    sizes = np.diff(plan.pack_offsets)
    total = plan.pack_tokens.sum()
    for index, tier in enumerate(plan.tiers):
        packs = plan.pack_tier == index
        tokens = int(plan.pack_tokens[packs].sum())
        full = tokens / max(int(packs.sum()) * tier.packing_length, 1)
        table.add_row(
            str(tier), f"{packs.sum():,}", f"{sizes[packs].sum():,}", f"{tokens:,}", f"{full:.2%}",
            f"{tokens / total:.1%}",
        )  # fmt: skip
    return table


def metrics_table(plans: Mapping[str, Plan], cost: CostModel, topology: Topology | None = None) -> Table:
    """The paper's measures of several plans side by side, modelled time, and memory where the topology is known.

    The first row is the paper's width (N = 4) on any number of ranks; the plan named "HBP" sorts its packs for it, as
    balance batching would.
    """
    measured = {name: plan_metrics(plan, cost) for name, plan in plans.items()}
    num_ranks = next(iter(measured.values())).num_ranks
    table = plain_table(
        f"Balance over N = {num_ranks} ranks; seconds as modelled by {cost.name}", ("", *plans),
        caption=legend(("ABR", "DBR", "PR", "CR", "Ave-T")),
    )  # fmt: skip
    abr = [side_by_side_abr(plan, 4, sort=name == "HBP") for name, plan in plans.items()]
    table.add_row("ABR of 4 longest gangs side by side", *(f"{value:.4f}" for value in abr))
    for label, show in METRIC_ROWS:
        table.add_row(label, *(show(values) for values in measured.values()))
    if topology is not None and np.isfinite(cost.machine.memory):
        peaks = [memory_of(plan, cost, topology) for plan in plans.values()]
        limit = f"{cost.machine.memory / 1e9:.0f}"
        table.add_row(f"GPU memory, estimate, GB of {limit}", *(f"{memory.peak / 1e9:.1f}" for memory in peaks))
    return table


METRIC_ROWS = (
    ("ABR", lambda m: f"{m.abr:.4f}"),
    ("DBR", lambda m: f"{m.dbr:.4f}"),
    ("PR", lambda m: f"{m.pr:.4f}"),
    ("CR", lambda m: f"{m.cr:.4f}"),
    ("CR that long samples force", lambda m: f"{m.forced_cr:.4f}"),
    ("Ave-T", lambda m: f"{m.ave_t:,.0f}"),
    ("modelled idle at barriers", lambda m: f"{m.idle:.2%}"),
    ("modelled time of the plan, seconds", lambda m: f"{m.epoch_seconds:,.1f}"),
)
"""(row label, how to print it from PlanMetrics)."""


def counts_line(plan: Plan) -> str:
    """What did not fit, in one line."""
    counts, num_runs = plan.counts, len(plan.sample_ids)
    planned = f"{num_runs:,} of {plan.data.num_samples:,} samples planned"
    if num_runs > plan.data.num_samples:
        planned = f"{plan.data.num_samples:,} samples planned {num_runs:,} times in all"
    return (
        f"{planned}; {counts.get('dropped', 0):,} dropped, "
        f"{counts.get('truncated', 0):,} truncated; {counts.get('dummies', 0):,} dummy micro-batches of weight zero"
    )


def verdict(plan: Plan, naive: Plan, cost: CostModel) -> str:
    """Why anyone should care, in one line."""
    ours, theirs = plan_metrics(plan, cost), plan_metrics(naive, cost)
    ratio = theirs.epoch_seconds / ours.epoch_seconds
    return (
        f"HBP: {ours.idle:.1%} of GPU time idle at barriers, naive packing {theirs.idle:.1%}; modelled {ratio:.2f}x "
        "as fast as naive packing"
    )


def remarks(plan: Plan, naive: Plan, cost: CostModel, topology: Topology, misfit: str = "") -> Iterator[str]:
    """What the user should know of a plan, one line each: memory, speed, step sizes."""
    if trouble := misfit or problem(plan, cost, topology):
        yield f"the plan does not fit into memory: {trouble}"
    if plan_metrics(naive, cost).epoch_seconds <= plan_metrics(plan, cost).epoch_seconds:
        yield "naive packing is modelled as fast: this data has little to balance on these tiers and ranks"
    tokens = int(plan.pack_tokens.sum()) / plan.num_steps
    if plan.num_steps > 1 and abs(tokens / plan.step_tokens - 1) > STEP_TOLERANCE:
        slot = plan.num_ranks * min(tier.local_tokens for tier in plan.tiers)
        yield (
            f"steps hold {tokens:,.0f} tokens on average, {plan.step_tokens:,} were asked for: a step is at least one "
            f"micro-batch on every rank, here {slot:,} token slots; use shorter tiers or fewer ranks for smaller steps"
        )


def draw_comparison(measured: dict[str, PlanMetrics], path: Path) -> None:
    """Write a bar picture of idle time and epoch time by method to `path` (PNG or SVG by suffix)."""
    plt = pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(measured) + 1.6), sharey=True)
    names = list(measured)
    left.barh(names, [100 * m.idle for m in measured.values()], color="#b0413e")
    left.set_xlabel("modelled idle time, %")
    right.barh(names, [m.epoch_seconds for m in measured.values()], color="#3d6b99")
    right.set_xlabel("modelled epoch, s")
    left.invert_yaxis()
    save_picture(figure, path)


def comparison_table(contenders: list[Contender], bound: float) -> Table:
    """Planners side by side; `bound` is the least possible epoch in seconds."""
    width = contenders[0].plan.num_ranks
    table = plain_table(
        f"N = {width} ranks; epoch: over the lower bound ({bound:,.1f} s, all work / ranks)",
        ("planner", "epoch", "idle", "ABR", "DBR", "PR", "CR", "eta^2", "plan s"),
        text_width=20,
        caption=f"{legend(('ABR', 'DBR', 'PR', 'CR'))}; eta^2: variance of log-length that the step explains, 0 is "
        "random order",
    )
    for one in contenders:
        m = one.metrics
        table.add_row(
            one.name, f"{m.epoch_seconds / bound:.3f}", f"{m.idle:.1%}", f"{m.abr:.3f}", f"{m.dbr:.3f}", f"{m.pr:.3f}",
            f"{m.cr:.3f}", f"{one.randomness.eta_squared:.3f}", f"{one.planning_seconds:.1f}",
        )  # fmt: skip
    return table
