"""Plans as tables for a terminal and as a picture."""

from pathlib import Path

from rich.table import Table

from megatron_hbp.planning.compare import Contender
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics
from megatron_hbp.planning.measure.quality import side_by_side_abr
from megatron_hbp.report.picture import pyplot, save_picture


def tier_table(plan: Plan) -> Table:
    """One row a tier: what it is and what it got."""
    table = Table(title=f"Plan {plan.hash[:12]}: {plan.num_steps} steps on {plan.num_ranks} ranks ({plan.schedule})")
    for heading in ("tier", "CP degree", "recompute", "packs", "samples", "tokens", "full", "share of tokens"):
        table.add_column(heading, justify="left" if heading in ("tier", "recompute") else "right")
    sizes = plan.pack_offsets[1:] - plan.pack_offsets[:-1]
    total = plan.pack_tokens.sum()
    for index, tier in enumerate(plan.tiers):
        packs = plan.pack_tier == index
        tokens = int(plan.pack_tokens[packs].sum())
        full = tokens / max(int(packs.sum()) * tier.packing_length, 1)
        table.add_row(
            f"{tier.packing_length:,}", str(tier.cp_degree), str(tier.recompute), f"{packs.sum():,}",
            f"{sizes[packs].sum():,}", f"{tokens:,}", f"{full:.2%}", f"{tokens / total:.1%}",
        )  # fmt: skip
    return table


def metrics_table(plans: dict[str, Plan], cost: CostModel) -> Table:
    """The paper's measures of several plans side by side, and modelled time.

    The first row is the paper's width (N = 4) on any number of ranks; the plan named "HBP" sorts its packs for it, as
    balance batching would.
    """
    measured = {name: plan_metrics(plan, cost) for name, plan in plans.items()}
    num_ranks = next(iter(measured.values())).num_ranks
    table = Table(title=f"Balance over N = {num_ranks} ranks; seconds as modelled by {cost.name}")
    table.add_column("")
    for name in plans:
        table.add_column(name, justify="right")
    abr = [side_by_side_abr(plan, 4, sort=name == "HBP") for name, plan in plans.items()]
    table.add_row("ABR  were 4 longest gangs side by side", *(f"{value:.4f}" for value in abr))
    for label, show in METRIC_ROWS:
        table.add_row(label, *(show(values) for values in measured.values()))
    return table


METRIC_ROWS = (
    ("ABR  attention imbalance", lambda m: f"{m.abr:.4f}"),
    ("DBR  token imbalance", lambda m: f"{m.dbr:.4f}"),
    ("PR   padding", lambda m: f"{m.pr:.4f}"),
    ("CR   tokens in CP packs", lambda m: f"{m.cr:.4f}"),
    ("CR   that long samples force", lambda m: f"{m.forced_cr:.4f}"),
    ("Ave-T tokens per rank and micro-batch", lambda m: f"{m.ave_t:,.0f}"),
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
    table = Table(title=f"N = {width} ranks; epoch over the lower bound ({bound:,.1f} s, all work / ranks)")
    for heading in (
        "planner", "DBR", "ABR", "PR", "CR", "Ave-T", "idle", "epoch / bound", "eta^2", "trend", "planning, s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "planner" else "right")
    for one in contenders:
        m = one.metrics
        table.add_row(
            one.name, f"{m.dbr:.4f}", f"{m.abr:.4f}", f"{m.pr:.4f}", f"{m.cr:.3f}", f"{m.ave_t:,.0f}",
            f"{m.idle:.2%}", f"{m.epoch_seconds / bound:.3f}", f"{one.randomness.eta_squared:.4f}",
            f"{one.randomness.trend:.2f}", f"{one.planning_seconds:.2f}",
        )  # fmt: skip
    return table
