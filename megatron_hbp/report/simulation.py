"""Simulated epochs as tables, and a step as a picture over time."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_hbp.planning.core.pipeline import run_pipeline
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.simulate.simulator import Simulation, gang_ends
from megatron_hbp.report.picture import pyplot, save_picture
from megatron_hbp.report.terminal import plain_table

_COLORS = ("#3d6b99", "#5b8c5a", "#8a6bb1", "#c98a2b", "#4f9d9d", "#9a5f3c", "#7a7a3a", "#5a5a8c")
"""One per tier."""
_SENT, _EXPERT, _TAIL = "#1d1d1d", "#d07fa8", "#b0413e"
_MOST_RANKS = 32
"""Rows of a picture that can be distinguished."""


def summary_table(plan: Plan, found: Simulation) -> Table:
    """What an epoch takes."""
    t = found.topology
    table = plain_table(
        f"{t.num_nodes} nodes x {t.gpus_per_node} GPUs: TP {t.tp}, PP {t.pp}"
        f"{f' x {t.virtual_stages} chunks' if t.virtual_stages > 1 else ''}, EP {t.ep}, {t.num_ranks} ranks; "
        f"seconds as modelled by {found.cost.name}",
        ("", ""),
    )
    table.show_header = False
    rows = [
        ("epoch", f"{found.epoch_seconds:,.1f} s, {plan.num_steps:,} steps"),
        ("GPU days", f"{found.gpu_days:,.3f}"),
        ("tokens per second and GPU", f"{found.tokens_per_gpu_second:,.0f}"),
        ("step, shortest / median / longest", " / ".join(f"{q:.2f} s" for q in np.quantile(found.wall, (0, 0.5, 1)))),
        ("compute", f"{1 - sum(found.idle().values()):.2%}"),
    ]
    memory = found.memory
    if memory is not None:
        where = f"stage {memory.stage}, step {memory.step}, rank {memory.rank}"
        verdict = "left" if memory.headroom >= 0 else "MISSING: the plan does not fit"
        rows += [
            ("GPU memory (estimate)", f"{memory.peak / 1e9:.1f} of {memory.limit / 1e9:.0f} GB at {where}"),
            ("  of it weights and optimizer", f"{memory.states / 1e9:.1f} GB"),
            ("  of it activations in flight", f"{memory.activations / 1e9:.1f} GB"),
            ("  headroom", f"{abs(memory.headroom) / 1e9:.1f} GB {verdict}"),
        ]
    for row in rows:
        table.add_row(*row)
    return table


def idle_table(found: Simulation) -> Table:
    """Time without compute, by cause."""
    table = plain_table("Time without compute", ("cause", "share", "seconds per GPU"))
    idle = found.idle()
    for cause, share in idle.items():
        table.add_row(cause, f"{share:.2%}", f"{share * found.epoch_seconds:,.1f}")
    total = sum(idle.values())
    table.add_row("all", f"{total:.2%}", f"{total * found.epoch_seconds:,.1f}", end_section=True)
    if found.contention_seconds:
        mean = found.contention_seconds / found.topology.num_ranks
        table.add_row("(CP and EP on one link, of these)", f"{mean / found.epoch_seconds:.2%}", f"{mean:,.1f}")
    return table


def draw_steps(plan: Plan, found: Simulation, path: Path, step: int | None = None) -> None:
    """Draw one step over time to `path` (PNG or SVG by suffix): ranks, or the stages of a pipeline.

    Without `step` it is the one with most waiting (imbalance and bubble).
    """
    plt = pyplot()
    from matplotlib.patches import Patch

    if step is None:
        step = int((found.imbalance.mean(axis=1) + found.bubble).argmax())
    pipeline = found.topology.pp > 1
    num_rows = found.topology.pp if pipeline else min(plan.num_ranks, _MOST_RANKS)
    figure, axes = plt.subplots(figsize=(11, 0.26 * num_rows + 2.0))
    (_stage_bars if pipeline else _rank_bars)(axes, plan, found, step, num_rows)
    wall = float(found.wall[step])
    tail = float(found.sync[step] + found.cost.step_seconds)
    if tail:
        axes.axvspan(wall - tail, wall, color=_TAIL, alpha=0.8)
    axes.set_xlim(0, wall)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xlabel("seconds from the start of the step")
    axes.set_ylabel("pipeline stage" if pipeline else "rank")
    axes.set_title(
        f"step {step}: {wall:.2f} s, {plan.num_micro_batches[step]} micro-batches; white is waiting", loc="left"
    )
    legend = [Patch(color=color, label=str(tier)) for color, tier in zip(_COLORS, plan.tiers, strict=False)]
    extra = [(found.exchange, _SENT, "CP exchange"), (found.expert, _EXPERT, "expert all-to-all")]
    legend += [Patch(color=c, label=label) for grid, c, label in extra if grid.any() and not pipeline]
    legend += [Patch(color=_TAIL, label="gradient sync, optimizer")] if tail else []
    legend += [Patch(color="#888888", label="pale: forward, full: backward")] if pipeline else []
    axes.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.6 / (0.26 * num_rows + 1)), ncols=3, frameon=False
    )
    save_picture(figure, path)


def _rank_bars(axes: Any, plan: Plan, found: Simulation, step: int, num_rows: int) -> None:
    """Packs on their ranks: compute in the tier's colour, then what it sends."""
    parts_of = found.packs
    packs = np.flatnonzero(plan.pack_step == step)
    if plan.schedule == "gang":
        starts = gang_ends(plan, parts_of.total)[0]
    else:
        slot_seconds = np.zeros(int(plan.num_micro_batches[step]))
        np.maximum.at(slot_seconds, plan.pack_slot[packs], parts_of.total[packs])
        starts = np.zeros(plan.num_packs)
        starts[packs] = (np.cumsum(slot_seconds) - slot_seconds)[plan.pack_slot[packs]]
    for pack in packs:
        at = starts[pack]
        parts = ((parts_of.compute, _COLORS[plan.pack_tier[pack] % len(_COLORS)]), (parts_of.exchange, _SENT))
        for seconds, color in (*parts, (parts_of.expert, _EXPERT)):
            first = int(plan.pack_rank0[pack])
            ranks = np.arange(first, min(first + int(plan.pack_cp[pack]), num_rows))
            if seconds[pack] and len(ranks):
                axes.barh(ranks, seconds[pack], left=at, height=0.86, color=color, edgecolor="white", linewidth=0.3)
            at += seconds[pack]


def _stage_bars(axes: Any, plan: Plan, found: Simulation, step: int, num_rows: int) -> None:
    """Forward and backward passes of the slots on the stages, in the colour of the slot's slowest tier."""
    count = int(plan.num_micro_batches[step])
    total, forward, tier = np.zeros((1, count)), np.zeros((1, count)), np.zeros(count, np.int64)
    for pack in np.flatnonzero(plan.pack_step == step):
        slot = plan.pack_slot[pack]
        if found.packs.total[pack] > total[0, slot]:
            total[0, slot], forward[0, slot] = found.packs.total[pack], found.packs.forward[pack]
            tier[slot] = plan.pack_tier[pack]
    passes = run_pipeline(
        forward,
        total - forward,
        num_stages=num_rows,
        num_chunks=found.topology.virtual_stages,
        hop=found.hop(plan, step),
    )
    for one in passes:
        axes.barh(
            one.stage, one.end[0] - one.start[0], left=one.start[0], height=0.86, edgecolor="white", linewidth=0.3,
            color=_COLORS[tier[one.micro_batch] % len(_COLORS)], alpha=1.0 if one.backward else 0.5,
        )  # fmt: skip
