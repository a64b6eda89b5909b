"""`hbp plan`: make a plan, show one, compare methods."""

import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from megatron_hbp.commands import shared
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.compare import compare as compare_all
from megatron_hbp.planning.compare import contenders
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.rows import plan_rows
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import FORM, parse_tiers
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.file import cost_file_of, cost_model
from megatron_hbp.planning.cost.memory import fitted
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.presets import DEFAULT_COST_MODEL
from megatron_hbp.planning.measure.quality import lower_bound
from megatron_hbp.planning.packing.methods import METHODS
from megatron_hbp.planning.planner import make_plan, naive_request
from megatron_hbp.planning.request import OUR_PACKING, Planner, Request, check_ranks
from megatron_hbp.planning.reschedule import MAX_EPOCHS, epoch_seed, join_epochs, reschedule
from megatron_hbp.planning.select.from_profile import profiled
from megatron_hbp.planning.select.joint import Space, select_joint
from megatron_hbp.report.plan_tables import (
    comparison_table,
    counts_line,
    draw_comparison,
    metrics_table,
    remarks,
    tier_table,
    verdict,
)
from megatron_hbp.report.selection import print_selection
from megatron_hbp.report.terminal import table_console

app = typer.Typer(help="Make, show and compare plans.", invoke_without_command=True, no_args_is_help=True)


class Overlong(StrEnum):
    """What to do with samples longer than the longest tier."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class Schedule(StrEnum):
    """How ranks line up."""

    lockstep = "lockstep"
    gang = "gang"


class Format(StrEnum):
    """How to print a plan."""

    table = "table"
    jsonl = "jsonl"


class Select(StrEnum):
    """How tiers are selected."""

    joint = "joint"
    paper = "paper"


Packing = StrEnum("Packing", {name: name for name in (OUR_PACKING, *METHODS)})  # type: ignore[misc]


@app.callback()
def plan(
    context: typer.Context,
    lengths: shared.Lengths = None,
    store: shared.Store = None,
    ranks: Annotated[int | None, typer.Option(help="Data-parallel ranks: world size / (TP x PP).")] = None,
    tiers: Annotated[str | None, typer.Option(help=f"{FORM}.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Tokens of one optimizer step.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes.")] = None,
    overwrite: shared.Overwrite = False,
    seed: shared.Seed = 0,
    schedule: Annotated[Schedule, typer.Option(help="gang: dense models without pipeline.")] = Schedule.lockstep,
    packing: Annotated[Packing, typer.Option(help="balanced is ours; others run the paper's pipeline.")] = Packing(
        OUR_PACKING
    ),
    cost: shared.Cost = None,
    loss_tokens: shared.LossTokens = None,
    overlong: Annotated[Overlong, typer.Option(help="Samples longer than the longest tier.")] = Overlong.error,
    longest: Annotated[int | None, typer.Option(min=1, help="Longer samples are over-long; see --overlong.")] = None,
    curriculum_steps: Annotated[int, typer.Option(min=0, help="Steps at the start with the short tier only.")] = 0,
    slot_multiple: shared.SlotMultiple = 1,
    epochs: Annotated[
        int, typer.Option(min=1, max=MAX_EPOCHS, help="Passes over the data, each in an order of its own.")
    ] = 1,
    tp: shared.Tp = 1,
    pp: shared.Pp = 1,
    virtual_stages: shared.VirtualStages = 1,
    ep: shared.Ep = 1,
    gpus_per_node: shared.GpusPerNode = 8,
    gpu_memory: shared.GpuMemory = None,
    memory: shared.Memory = None,
    auto: Annotated[bool, typer.Option("--auto", help="Select the tiers, instead of --tiers.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="--auto: the table of `hbp profile`; its cost model lies beside it.")
    ] = None,
    hbp_select: Annotated[
        Select | None, typer.Option(help="--auto: joint (default; least modelled epoch), or paper (its two stages).")
    ] = None,
    equal_local_tokens: Annotated[
        bool, typer.Option("--equal-local-tokens", help="--auto: static shapes, as many tokens on a rank in all tiers.")
    ] = False,
) -> None:
    """Plan: `hbp plan --store STORE --ranks 32 --tiers ... --step-tokens T --out PLAN`, or --auto for --tiers."""
    if context.invoked_subcommand is not None:
        return
    given = {"--ranks": ranks, "--tiers": tiers or auto or None, "--step-tokens": step_tokens, "--out": out}
    missing = [flag for flag, value in given.items() if value is None]
    if missing or ranks is None or step_tokens is None or out is None:
        raise ConfigError(f"hbp plan requires {', '.join(missing)} too (--auto selects tiers); see `hbp plan --help`")
    selecting = {"--profile": profile, "--hbp-select": hbp_select, "--equal-local-tokens": equal_local_tokens or None}
    stray = [flag for flag, value in selecting.items() if value is not None]
    if stray and not auto:
        raise ConfigError(f"{', '.join(stray)} select tiers: give --auto too, or leave out what --tiers decides")
    if tiers is not None and auto:
        raise ConfigError("--tiers and --auto exclude each other; give the tiers, or have them selected")
    planfile.check_target(out, overwrite=overwrite)
    check_ranks((), ranks)
    samples = shared.read_input(lengths, store, loss_tokens)
    topology = Topology.of_ranks(
        ranks, gpus_per_node=gpus_per_node, tp=tp, pp=pp, virtual_stages=virtual_stages, ep=ep
    )  # fmt: skip
    table = profile_table.load(profile) if profile else None
    model = cost_model(cost or (str(cost_file_of(profile)) if profile else DEFAULT_COST_MODEL))
    model, space = shared.placed_cost(model, topology, gpu_memory), Space()
    if table is not None:
        model, space = profiled(table, model, samples.lengths, ranks)
    model, misfit = _fitted(model, topology, memory, needed=auto)
    request = Request(
        num_ranks=ranks, step_tokens=step_tokens, seed=seed, schedule=schedule.value, cost=model,
        packing=packing.value, overlong=overlong.value, longest=longest, slot_multiple=slot_multiple,
    )  # fmt: skip
    console = table_console()
    if tiers is not None:
        request = replace(request, tiers=parse_tiers(tiers, fill=model.with_recompute))
    else:
        found = select_joint(_selected_for(samples, request), request, space, equal_local_tokens=equal_local_tokens)
        request = replace(request, tiers=print_selection(console, found, model.name, paper=hbp_select is Select.paper))
    model.check_layers(request.tiers)
    made = join_epochs(list(_epochs(samples, replace(request, curriculum_steps=curriculum_steps), epochs)))
    planfile.save(made, out)
    naive = join_epochs(list(_epochs(samples, naive_request(request), epochs)))
    plans = {"HBP": made, f"naive, all in {request.tiers[-1].packing_length:,}": naive}
    console.print(tier_table(made))
    console.print(metrics_table(plans, model, topology))
    console.print(counts_line(made), highlight=False)
    console.print(verdict(made, naive, model), highlight=False)
    for remark in remarks(made, naive, model, topology, misfit):
        console.print(f"[yellow]note:[/] {remark}", highlight=False)
    console.print(f"plan written to {out} (hash {made.hash})", soft_wrap=True)


def _fitted(model: CostModel, topology: Topology, memory: str | None, *, needed: bool) -> tuple[CostModel, str]:
    """(the model with what fits on the topology, why nothing does); raises ConfigError for that where `needed`."""
    try:
        return fitted(model, topology, shared.parse_memory(memory)), ""
    except ConfigError as error:
        if needed or memory is not None:
            raise
        return replace(model, recompute_layers=()), str(error)


def _selected_for(samples: Samples, request: Request) -> Samples:
    """The samples that tiers are selected for. Raises ConfigError for over-long ones that nothing is said of."""
    if request.longest is None:
        return samples
    too_long = int((samples.lengths > request.longest).sum())
    if too_long and request.overlong == "error":
        raise ConfigError(
            f"{too_long} samples are longer than --longest {request.longest}; add --overlong drop or truncate, "
            "or leave --longest out"
        )
    if request.overlong == "truncate":
        return Samples.of(np.minimum(samples.lengths, request.longest))
    return samples


def _epochs(samples: Samples, request: Request, epochs: int) -> Iterator[Plan]:
    """A plan for each pass, with a progress bar where there are several; the curriculum is in the first."""
    for epoch in track(range(epochs), description="planning", disable=epochs == 1, transient=True):
        steps = request.curriculum_steps if epoch == 0 else 0
        seed = epoch_seed(request.seed, epoch)
        yield make_plan(samples, replace(request, seed=seed, curriculum_steps=steps))


@app.command()
def show(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    format: Annotated[Format, typer.Option(help="jsonl: a line per step, micro-batch and CP gang.")] = Format.table,
    cost: shared.PlansCost = None,
) -> None:
    """Print a plan."""
    made = planfile.load(plan_file)
    if format is Format.jsonl:
        for row in plan_rows(made):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    console = table_console()
    console.print(tier_table(made))
    console.print(metrics_table({"HBP": made}, shared.plan_cost(made, cost)))
    console.print(counts_line(made), highlight=False)


@app.command("reschedule")
def reschedule_plan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks from now on.")],
    out: Annotated[Path, typer.Option(help="Where the new plan goes.")],
    overwrite: shared.Overwrite = False,
    from_step: Annotated[int, typer.Option(help="First step that has not run yet.")] = 0,
    slot_multiple: shared.SlotMultiple = 1,
    cost: shared.PlansCost = None,
) -> None:
    """Lay the rest of a plan out for another number of ranks: same packs, same steps, each sample once."""
    planfile.check_target(out, overwrite=overwrite)
    made = planfile.load(plan_file)
    model = shared.plan_cost(made, cost)
    changed = reschedule(made, num_ranks=ranks, cost=model, from_step=from_step, slot_multiple=slot_multiple)
    planfile.save(changed, out)
    console = table_console()
    console.print(tier_table(changed))
    console.print(counts_line(changed), highlight=False)
    console.print(f"plan written to {out} (hash {changed.hash})", soft_wrap=True)


@app.command()
def compare(
    lengths: shared.Lengths = None,
    store: shared.Store = None,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 32,
    tiers: Annotated[str, typer.Option(help="Tiers of the plan.")] = "16384:cp1,32768:cp2,65536:cp4,131072:cp8",
    step_tokens: Annotated[int, typer.Option(help="Tokens of one optimizer step.")] = 524288,
    cost: shared.Cost = None,
    seed: shared.Seed = 0,
    max_samples: Annotated[int, typer.Option(min=1, help="Compare on a random draw of so many.")] = 50000,
    picture: Annotated[Path | None, typer.Option(help="Draw idle and epoch times to a PNG or SVG file.")] = None,
    peers: Annotated[Path | None, typer.Option(help="A Python file with more planners, PLANNERS = {name: f}.")] = None,
) -> None:
    """Plan the same data in every way there is, and with peers, under one cost model."""
    samples = shared.read_input(lengths, store, None)
    if len(samples) > max_samples:
        samples = Samples.of(np.random.default_rng(seed).permutation(samples.lengths)[:max_samples])
    check_ranks((), ranks)
    topology = Topology.of_ranks(ranks)
    placed = shared.placed_cost(cost_model(cost or DEFAULT_COST_MODEL), topology, None)
    model, _ = _fitted(placed, topology, None, needed=False)
    request = Request(
        tiers=parse_tiers(tiers, fill=model.with_recompute), num_ranks=ranks, step_tokens=step_tokens, seed=seed,
        cost=model,
    )  # fmt: skip
    if samples.longest > request.limit:
        raise ConfigError(f"a sample of {samples.longest} tokens does not fit the longest tier; add a longer tier")
    planners = contenders() | (_load_planners(peers) if peers else {})
    found = list(track(compare_all(samples, request, planners), total=len(planners), description="planning"))
    settings = {(tier.local_tokens, tier.recompute) for tier in request.tiers}
    bound = lower_bound(
        samples.lengths, model, ranks, settings=[] if model.recompute_layers else list(settings),
        num_steps=min(one.metrics.num_steps for one in found),
    )  # fmt: skip
    console = table_console()
    console.print(comparison_table(found, bound))
    console.print(f"{len(samples):,} samples, {samples.lengths.sum():,} tokens; seconds as modelled by {model.name}")
    if picture:
        draw_comparison({one.name: one.metrics for one in found}, picture)
        console.print(f"picture written to {picture}")


def _load_planners(path: Path) -> dict[str, Planner]:
    if not path.is_file():
        raise ConfigError(f"no file with planners at {path}")
    try:
        found = runpy.run_path(str(path))["PLANNERS"]
    except Exception as error:  # whatever that file does
        raise ConfigError(f"{path} does not give PLANNERS = {{name: planner}}: {error!r}") from error
    if not isinstance(found, dict) or not all(map(callable, found.values())):
        raise ConfigError(f"{path}: PLANNERS must be a dict of functions of (samples, request)")
    return found
