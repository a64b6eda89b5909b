"""The record of a run: everything that was decided before its first step, in one file beside its checkpoints."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from megatron_hbp import __version__
from megatron_hbp.planning.core.json_files import write_json
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.runtime.refusals import megatron_defaults
from megatron_hbp.runtime.setup import Runtime, ranks_of_node

KIND, VERSION = "hbp run", 1
NAME = "run.json"


def write_record(runtime: Runtime, tiers: Sequence[Sequence[Tier]]) -> None:
    """Write the record on rank 0 where there is a run directory; a resumed run writes its own over it.

    Args:
        runtime: the run.
        tiers: those of each of its plans, with their exchanges.

    Raises:
        DiskError: the file could not be written.
    """
    args, options = runtime.args, runtime.options
    if options.run_dir is None or args.rank:
        return
    plans = [
        {"plan_hash": part.plan.hash, "tiers": [str(tier) for tier in resolved]}
        for part, resolved in zip(options.data, tiers, strict=True)
    ]
    defaults = megatron_defaults()
    changed = {name: value for name, value in vars(args).items() if name in defaults and value != defaults[name]}
    values = {
        "kind": KIND, "version": VERSION, "versions": versions(), "layout": layout_of(args), "options": options.flags,
        "plans": plans, "megatron_lm": {name: _plain(value) for name, value in changed.items()},
    }  # fmt: skip
    write_json(values, options.run_dir / NAME, "the record of the run", "--save")


def _plain(value: Any) -> Any:
    """What JSON has no type for as a string."""
    return value if isinstance(value, int | float | str | list | None) else str(value)


def versions() -> dict[str, str]:
    """Of what computes; not megatron.core.__version__, which ends with the commit of the repository one stands in."""
    return {"torch": torch.__version__, "megatron-core": version("megatron-core"), "megatron_hbp": __version__}


def layout_of(args: Any) -> dict[str, int]:
    """How the ranks are laid out; a node's size is in data-parallel ranks."""
    tp = args.tensor_model_parallel_size
    return {
        "world": args.world_size, "data_parallel": args.data_parallel_size, "tensor_parallel": tp,
        "pipeline_parallel": args.pipeline_model_parallel_size, "expert_parallel": args.expert_model_parallel_size,
        "node_size": ranks_of_node(tp),
    }  # fmt: skip
