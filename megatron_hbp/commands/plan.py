"""`hbp plan`: make a plan, show one, compare methods."""

import json
import runpy
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from megatron_hbp.commands.auto import Select, auto_tiers, parse_memory
from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.compare import Planner, contenders
from megatron_hbp.planning.compare import compare as compare_all
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.plan import DataFingerprint
from megatron_hbp.planning.core.rows import plan_rows
from megatron_hbp.planning.core.samples import PlanInput, read_lengths
from megatron_hbp.planning.core.tiers import Recompute, Tier, parse_tiers
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.file import cost_file_of, cost_model
from megatron_hbp.planning.cost.model import DEFAULT_COST_MODEL, CostModel
from megatron_hbp.planning.measure.quality import lower_bound
from megatron_hbp.planning.planner import check_lengths, check_ranks, make_plan, naive_plan
from megatron_hbp.planning.reschedule import epoch_seed, join_epochs, reschedule
from megatron_hbp.planning.schedule.placement import Request
from megatron_hbp.report.plan_tables import (
    comparison_table,
    counts_line,
    draw_comparison,
    metrics_table,
    tier_table,
)
from megatron_hbp.report.terminal import wide_console

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


Lengths = Annotated[Path | None, typer.Option(help="A .npy file with the token count of every sample.")]
Store = Annotated[Path | None, typer.Option(help="A token store made by `hbp prepare`.")]
LossTokens = Annotated[Path | None, typer.Option(help="A .npy file with the supervised tokens of every sample.")]
Ranks = Annotated[int | None, typer.Option(help="Data-parallel ranks: world size / (TP x PP).")]
Tiers = Annotated[str | None, typer.Option(help="For example 16384:cp1,131072:cp8.")]
StepTokens = Annotated[int | None, typer.Option(help="Tokens of one optimizer step.")]
Cost = Annotated[str | None, typer.Option(help=f"Cost model or FILE.json; without it {DEFAULT_COST_MODEL}.")]
PlansCost = Annotated[str | None, typer.Option(help="Cost model or FILE.json; without it the one the plan names.")]
SlotMultiple = Annotated[int, typer.Option(min=1, help="Micro-batches of a step come in multiples of this.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same data: same plan.")]


@app.callback()
def plan(
    context: typer.Context,
    lengths: Lengths = None,
    store: Store = None,
    ranks: Ranks = None,
    tiers: Tiers = None,
    step_tokens: StepTokens = None,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes.")] = None,
    seed: Seed = 0,
    schedule: Annotated[Schedule, typer.Option(help="gang: dense models without pipeline.")] = Schedule.lockstep,
    cost: Cost = None,
    loss_tokens: LossTokens = None,
    overlong: Annotated[Overlong, typer.Option(help="Samples longer than the longest tier.")] = Overlong.error,
    curriculum_steps: Annotated[int, typer.Option(min=0, help="Steps at the start with the short tier only.")] = 0,
    slot_multiple: SlotMultiple = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, each in an order of its own.")] = 1,
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
    memory: Annotated[
        str | None, typer.Option(help="--auto: LOCAL_TOKENS:LAYERS,... fewest recomputed layers that fit.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(help="--auto: samples longer than this need not fit a tier; see --overlong.")
    ] = None,
) -> None:
    """Plan: `hbp plan --lengths L.npy --ranks 32 --tiers ... --step-tokens T --out PLAN`, or --auto for --tiers."""
    if context.invoked_subcommand is not None:
        return
    given = {"--ranks": ranks, "--tiers": tiers or auto or None, "--step-tokens": step_tokens, "--out": out}
    missing = [flag for flag, value in given.items() if value is None]
    if missing or ranks is None or step_tokens is None or out is None:
        raise ConfigError(f"hbp plan needs {', '.join(missing)} too (--auto selects tiers); see `hbp plan --help`")
    _check_auto(tiers, auto, profile, hbp_select, equal_local_tokens, memory, longest)
    data = read_input(lengths, store, loss_tokens)
    table = profile_table.load(profile) if profile else None
    model = cost_model(cost or (str(cost_file_of(profile)) if profile else DEFAULT_COST_MODEL))
    if tiers is None:
        wanted = auto_tiers(
            check_lengths(data.lengths), model, table=table,
            select=hbp_select or Select.joint, num_ranks=ranks,
            memory=parse_memory(memory) if memory is not None else None, step_tokens=step_tokens, longest=longest,
            overlong=overlong.value, equal_local_tokens=equal_local_tokens, schedule=schedule.value,
            slot_multiple=slot_multiple, seed=seed, console=wide_console(),
        )  # fmt: skip
    else:
        wanted = parse_tiers(tiers)
        if cost:  # a named cost model knows how much must be recomputed to fit into memory
            wanted = tuple(model.with_recompute(tier) for tier in wanted)
            check_layers(wanted, model)
    common: dict[str, Any] = {"tiers": wanted, "num_ranks": ranks, "step_tokens": step_tokens, "cost": model}
    common |= {"overlong": overlong.value, "longest": longest}
    passes = [
        make_plan(
            data.lengths, **common, seed=epoch_seed(seed, epoch), schedule=schedule.value, loss_tokens=data.loss_tokens,
            curriculum_steps=curriculum_steps if epoch == 0 else 0, slot_multiple=slot_multiple,
            store_fingerprint=data.store_fingerprint,
        )
        for epoch in range(epochs)
    ]  # fmt: skip
    made = join_epochs(passes)
    planfile.save(made, out)
    naive = join_epochs([naive_plan(data.lengths, **common, seed=epoch_seed(seed, epoch)) for epoch in range(epochs)])
    console = wide_console()
    console.print(tier_table(made))
    console.print(metrics_table({"HBP": made, f"naive, all in {wanted[-1].packing_length:,}": naive}, model))
    console.print(counts_line(made))
    console.print(f"plan written to {out} (hash {made.hash})", soft_wrap=True)


def _check_auto(
    tiers: str | None, auto: bool, profile: Path | None, hbp_select: Select | None, equal: bool, memory: str | None,
    longest: int | None,
) -> None:  # fmt: skip
    """Raise ConfigError for --tiers with --auto, and for the latter's options without it."""
    if tiers is not None and auto:
        raise ConfigError("--tiers and --auto exclude each other; give the tiers, or have them selected")
    options = {
        "--profile": profile, "--hbp-select": hbp_select, "--equal-local-tokens": equal or None, "--memory": memory,
        "--longest": longest,
    }  # fmt: skip
    stray = [flag for flag, value in options.items() if value is not None]
    if stray and not auto:
        raise ConfigError(f"{', '.join(stray)} select tiers: give --auto too, or leave out what --tiers decides")


@app.command()
def show(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    format: Annotated[Format, typer.Option(help="jsonl: a line per step, micro-batch and CP gang.")] = Format.table,
    cost: PlansCost = None,
) -> None:
    """Print a plan."""
    made = planfile.load(plan_file)
    if format is Format.jsonl:
        for row in plan_rows(made):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    console = wide_console()
    console.print(tier_table(made))
    console.print(metrics_table({"HBP": made}, cost_model(cost or made.cost_model)))
    console.print(counts_line(made))


@app.command("reschedule")
def reschedule_plan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks from now on.")],
    out: Annotated[Path, typer.Option(help="Where the new plan goes.")],
    from_step: Annotated[int, typer.Option(help="First step that has not run yet.")] = 0,
    slot_multiple: SlotMultiple = 1,
    cost: PlansCost = None,
) -> None:
    """Lay the rest of a plan out for another number of ranks: same packs, same steps, each sample once."""
    made = planfile.load(plan_file)
    model = cost_model(cost or made.cost_model)
    changed = reschedule(made, num_ranks=ranks, cost=model, from_step=from_step, slot_multiple=slot_multiple)
    planfile.save(changed, out)
    console = wide_console()
    console.print(tier_table(changed))
    console.print(counts_line(changed))
    console.print(f"plan written to {out} (hash {changed.hash})", soft_wrap=True)


@app.command()
def compare(
    lengths: Lengths = None,
    store: Store = None,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 32,
    tiers: Annotated[str, typer.Option(help="Tiers of the plan.")] = "16384:cp1,32768:cp2,65536:cp4,131072:cp8",
    step_tokens: Annotated[int, typer.Option(help="Tokens of one optimizer step.")] = 524288,
    cost: Annotated[str, typer.Option(help="Cost model.")] = DEFAULT_COST_MODEL,
    seed: Seed = 0,
    max_samples: Annotated[int, typer.Option(min=1, help="Compare on a random draw of so many.")] = 50000,
    picture: Annotated[Path | None, typer.Option(help="Draw idle and epoch times to a PNG or SVG file.")] = None,
    peers: Annotated[Path | None, typer.Option(help="A Python file with more planners, PLANNERS = {name: f}.")] = None,
) -> None:
    """Plan the same data in every way there is, and with peers, under one cost model."""
    values = check_lengths(read_input(lengths, store, None).lengths)
    if len(values) > max_samples:
        values = np.random.default_rng(seed).permutation(values)[:max_samples]
    model = cost_model(cost)
    request = Request(
        tiers=tuple(model.with_recompute(tier) for tier in parse_tiers(tiers)), num_ranks=ranks,
        step_tokens=step_tokens, seed=seed, schedule="gang", cost=model, data=DataFingerprint.of(values),
    )  # fmt: skip
    check_ranks(request.tiers, ranks, step_tokens)
    if values.max() > request.tiers[-1].packing_length:
        raise ConfigError(f"a sample of {values.max()} tokens does not fit the longest tier; add a longer tier")
    planners = contenders() | (_load_planners(peers) if peers else {})
    found = list(track(compare_all(values, request, planners), total=len(planners), description="planning"))
    bound = lower_bound(
        values, model, ranks, settings=[] if model.recompute_layers else _settings(request),
        num_steps=min(one.metrics.num_steps for one in found),
    )  # fmt: skip
    console = wide_console()
    console.print(comparison_table(found, bound))
    console.print(f"{len(values):,} samples, {values.sum():,} tokens; seconds as modelled by {model.name}")
    if picture:
        draw_comparison({one.name: one.metrics for one in found}, picture)
        console.print(f"picture written to {picture}")


def _settings(request: Request) -> list[tuple[int, Recompute]]:
    """(local tokens, recompute) of the tiers, for a cost model without a profile."""
    return list({(tier.local_tokens, tier.recompute) for tier in request.tiers})


def _load_planners(path: Path) -> dict[str, Planner]:
    if not path.is_file():
        raise ConfigError(f"no file with planners at {path}")
    try:
        found = runpy.run_path(str(path))["PLANNERS"]
    except Exception as error:  # whatever that file does
        raise ConfigError(f"{path} does not give PLANNERS = {{name: planner}}: {error!r}") from error
    if not isinstance(found, dict) or not all(map(callable, found.values())):
        raise ConfigError(f"{path}: PLANNERS is no dict of functions of (lengths, request)")
    return found


def check_layers(tiers: tuple[Tier, ...], model: CostModel) -> None:
    """Raise ConfigError for a tier that recomputes more layers than the model has."""
    for tier in tiers:
        if tier.recompute.num_layers > model.num_layers:
            raise ConfigError(f"tier {tier} recomputes more than the {model.num_layers} layers of {model.name}")


def read_input(lengths: Path | None, store: Path | None, loss_tokens: Path | None) -> PlanInput:
    """Read --lengths or --store, exactly one of them."""
    if (lengths is None) == (store is None):
        raise ConfigError("give either --lengths FILE.npy or --store DIRECTORY")
    if lengths:
        return read_lengths(lengths, loss_tokens)
    if loss_tokens:
        raise ConfigError("a store counts its own loss tokens; --loss-tokens goes with --lengths")
    opened = TokenStore.open(store)  # type: ignore[arg-type]
    return PlanInput(lengths=opened.lengths, loss_tokens=opened.loss_tokens, store_fingerprint=opened.fingerprint)
