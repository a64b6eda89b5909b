"""Options and steps that several sub-commands share."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples, read_samples
from megatron_hbp.planning.cost.file import cost_model, from_json
from megatron_hbp.planning.cost.model import CostModel, MemoryTable
from megatron_hbp.planning.cost.presets import DEFAULT_COST_MODEL
from megatron_hbp.planning.simulate.placement import place_cost

Lengths = Annotated[Path | None, typer.Option(help="A .npy file with the token count of every sample.")]
Store = Annotated[Path | None, typer.Option(help="A token store made by `hbp prepare`.")]
LossTokens = Annotated[Path | None, typer.Option(help="A .npy file with the supervised tokens of every sample.")]
Cost = Annotated[str | None, typer.Option(help=f"Cost model or FILE.json; default {DEFAULT_COST_MODEL}.")]
PlansCost = Annotated[str | None, typer.Option(help="Cost model or FILE.json; default: the plan's own.")]
SlotMultiple = Annotated[int, typer.Option(min=1, help="Micro-batches of a step come in multiples of this.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same data: same plan.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a plan that is there.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel GPUs.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline stages.")]
VirtualStages = Annotated[int, typer.Option(min=1, help="Model chunks of a stage (interleaved 1F1B).")]
Ep = Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs of a node.")]
GpuMemory = Annotated[float | None, typer.Option(min=1.0, help="GB of a GPU; default: the cost model's (80).")]
Memory = Annotated[str | None, typer.Option(help="LOCAL_TOKENS:LAYERS,... fewest recomputed layers that fit.")]


def read_input(lengths: Path | None, store: Path | None, loss_tokens: Path | None) -> Samples:
    """Read --lengths or --store, exactly one of them."""
    if (lengths is None) == (store is None):
        raise ConfigError("give either --lengths FILE.npy or --store DIRECTORY")
    if lengths:
        return read_samples(lengths, loss_tokens)
    if loss_tokens:
        raise ConfigError("a store counts its own loss tokens; --loss-tokens goes with --lengths")
    from megatron_hbp.data.store import TokenStore

    opened = TokenStore.open(store)  # type: ignore[arg-type]
    return Samples.of(opened.lengths, opened.loss_tokens, store_fingerprint=opened.fingerprint)


def plan_cost(plan: Plan, name: str | None) -> CostModel:
    """The cost model of that name or file, or the one that balanced `plan`."""
    if name:
        return cost_model(name)
    return from_json(plan.cost, "the plan's cost model", "make the plan again, or name a model with --cost")


def placed_cost(cost: CostModel, topology: Topology, gpu_memory: float | None, **links: float | None) -> CostModel:
    """`cost` on a topology; `gpu_memory` in GB and `links` in GB/s replace what the machine has."""
    changes = {"memory": gpu_memory, **links}
    return place_cost(cost.with_machine(**{k: 1e9 * v for k, v in changes.items() if v is not None}), topology)


def parse_memory(text: str | None) -> MemoryTable:
    """Read `2048:0,4096:8,16384:28`: (local tokens, fewest recomputed layers that fit), sorted. Raises ConfigError."""
    found = []
    for part in text.split(",") if text is not None else []:
        tokens, colon, count = part.strip().partition(":")
        if not (colon and tokens.isdecimal() and count.isdecimal() and int(tokens)):
            raise ConfigError(
                f"--memory {part.strip()!r} is not LOCAL_TOKENS:LAYERS; write for example 4096:8,16384:28"
            )
        found.append((int(tokens), int(count)))
    return tuple(sorted(found))
