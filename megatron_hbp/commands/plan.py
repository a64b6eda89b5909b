"""`hbp plan`: make a plan, show one, compare methods."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import planfile
from megatron_hbp.planning.cost import DEFAULT_COST_MODEL, preset
from megatron_hbp.planning.inputs import PlanInput, read_lengths, read_store
from megatron_hbp.planning.planner import make_plan, naive_plan
from megatron_hbp.planning.show import plan_rows
from megatron_hbp.planning.types import parse_tiers
from megatron_hbp.report.plan_tables import counts_line, metrics_table, tier_table

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
Cost = Annotated[str | None, typer.Option(help=f"Cost model; without it {DEFAULT_COST_MODEL} balances the plan.")]
Seed = Annotated[int, typer.Option(help="Same seed, same data: same plan.")]


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
) -> None:
    """Plan: `hbp plan --lengths L.npy --ranks 32 --tiers ... --step-tokens T --out PLAN`."""
    if context.invoked_subcommand is not None:
        return
    given = {"--ranks": ranks, "--tiers": tiers, "--step-tokens": step_tokens, "--out": out}
    missing = [flag for flag, value in given.items() if value is None]
    if missing or ranks is None or tiers is None or step_tokens is None or out is None:
        raise ConfigError(f"hbp plan needs {', '.join(missing)} too; see `hbp plan --help`")
    data = read_input(lengths, store, loss_tokens)
    model = preset(cost or DEFAULT_COST_MODEL)
    wanted = parse_tiers(tiers)
    if cost:  # a named cost model knows how much must be recomputed to fit into memory
        wanted = tuple(model.with_recompute(tier) for tier in wanted)
    common: dict[str, Any] = {
        "tiers": wanted,
        "num_ranks": ranks,
        "step_tokens": step_tokens,
        "seed": seed,
        "cost": model,
    }
    made = make_plan(
        data.lengths, **common, schedule=schedule.value, loss_tokens=data.loss_tokens, overlong=overlong.value,
        curriculum_steps=curriculum_steps, store_fingerprint=data.store_fingerprint,
    )  # fmt: skip
    planfile.save(made, out)
    naive = naive_plan(data.lengths, **common, overlong=overlong.value)
    console = Console()
    console.print(tier_table(made))
    console.print(metrics_table({"HBP": made, f"naive, all in {wanted[-1].packing_length:,}": naive}, model))
    console.print(counts_line(made))
    console.print(f"plan written to {out} (hash {made.hash})", soft_wrap=True)


@app.command()
def show(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    format: Annotated[Format, typer.Option(help="jsonl: a line per step, micro-batch and CP gang.")] = Format.table,
) -> None:
    """Print a plan."""
    made = planfile.load(plan_file)
    if format is Format.jsonl:
        for row in plan_rows(made):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    console = Console()
    console.print(tier_table(made))
    console.print(metrics_table({"HBP": made}, preset(made.cost_model)))
    console.print(counts_line(made))


def read_input(lengths: Path | None, store: Path | None, loss_tokens: Path | None) -> PlanInput:
    """Read --lengths or --store, exactly one of them."""
    if (lengths is None) == (store is None):
        raise ConfigError("give either --lengths FILE.npy or --store DIRECTORY")
    return read_lengths(lengths, loss_tokens) if lengths else read_store(store, loss_tokens)  # type: ignore[arg-type]
