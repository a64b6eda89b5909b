"""`hbp simulate`: what an epoch of a plan would take on a cluster, and what its GPUs would wait for."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hbp.commands import shared
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.simulate.simulator import Simulation, simulate
from megatron_hbp.report.simulation import draw_steps, idle_table, summary_table
from megatron_hbp.report.terminal import table_console


def simulate_plan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN")],
    nodes: Annotated[int, typer.Option(help="Nodes.")],
    gpus_per_node: shared.GpusPerNode = 8,
    tp: shared.Tp = 1,
    pp: shared.Pp = 1,
    virtual_stages: shared.VirtualStages = 1,
    ep: shared.Ep = 1,
    cost: shared.PlansCost = None,
    node_bandwidth: Annotated[float | None, typer.Option(min=1.0, help="GB/s of a GPU inside a node.")] = None,
    cluster_bandwidth: Annotated[float | None, typer.Option(min=1.0, help="GB/s of a GPU between nodes.")] = None,
    overlap: Annotated[float, typer.Option(help="Share of compute under which exchanges hide, 0 to 1.")] = 0.0,
    overlap_gradients: Annotated[bool, typer.Option(help="Hide gradient sync under passes.")] = True,
    fully_sharded: Annotated[bool, typer.Option(help="Weights and gradients are sharded too.")] = False,
    gpu_memory: shared.GpuMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every step.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw steps over time to a PNG or SVG file.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The step to draw; default: the one that waits most.")] = None,
) -> None:
    """Simulate a plan on a cluster: epoch, idle time by cause, GPU days, memory."""
    given = {"node-bandwidth": node_bandwidth, "cluster-bandwidth": cluster_bandwidth, "gpu-memory": gpu_memory}
    for flag, value in given.items():
        # inf is a float to the parser, and not a number to JSON
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{flag} {value}: give a finite number")
    plan = planfile.load(plan_file)
    topology = Topology(
        num_nodes=nodes, gpus_per_node=gpus_per_node, tp=tp, pp=pp, virtual_stages=virtual_stages, ep=ep,
        fully_sharded=fully_sharded,
    )  # fmt: skip
    links = {"node_bandwidth": node_bandwidth, "cluster_bandwidth": cluster_bandwidth}
    model = shared.placed_cost(shared.plan_cost(plan, cost), topology, gpu_memory, **links)
    if step is not None and step >= plan.num_steps:
        raise ConfigError(f"--step {step}: the plan has steps 0 to {plan.num_steps - 1}")
    found = simulate(plan, model, topology, overlap=overlap, overlap_gradients=overlap_gradients)
    if as_json:
        sys.stdout.write(json.dumps(as_rows(plan, found)) + "\n")
    else:
        console = table_console()
        console.print(summary_table(plan, found))
        console.print(idle_table(found))
    if picture:
        draw_steps(plan, found, picture, step)
        print(f"picture written to {picture}", file=sys.stderr)


def as_rows(plan: Plan, found: Simulation) -> dict[str, Any]:
    """The simulation as JSON values: the epoch, shares of idle time, memory, and a row per step (seconds)."""
    means = {name: getattr(found, name).mean(axis=1) for name in ("compute", "exchange", "expert", "imbalance")}
    columns = {"seconds": found.wall, **means, "bubble": found.bubble, "gradient_sync": found.sync}
    steps = [
        {"step": step, "micro_batches": int(plan.num_micro_batches[step])}
        | {name: float(values[step]) for name, values in columns.items()}
        for step in range(plan.num_steps)
    ]
    memory = found.memory and asdict(found.memory) | {"peak": found.memory.peak, "headroom": found.memory.headroom}
    return {
        "plan": plan.hash, "cost_model": found.cost.name, "topology": asdict(found.topology),
        "epoch_seconds": found.epoch_seconds, "gpu_days": found.gpu_days,
        "tokens_per_gpu_second": found.tokens_per_gpu_second, "idle": found.idle(),
        "contention_seconds": found.contention_seconds, "memory": memory, "steps": steps,
    }  # fmt: skip
