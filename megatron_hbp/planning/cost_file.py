"""A fitted cost model as a JSON file: `hbp profile` writes it, `hbp plan --cost FILE.json` reads it."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.cost import PRESETS, CostModel, preset
from megatron_hbp.planning.exchange import AttentionShape
from megatron_hbp.planning.profile_table import read_json, write_json

KIND = "hbp cost model"
VERSION = 1
_REMEDY = "fit it again with `hbp profile`"


def save(cost: CostModel, path: Path) -> None:
    """Write a cost model; infinite rates (nothing measured there) become null. Raises DiskError."""
    values = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(cost).items()}
    write_json({"kind": KIND, "version": VERSION, "cost": values}, path, "cost model", "--hbp-profile-out")


def load(path: Path) -> CostModel:
    """Read a cost model. Raises ConfigError for a missing or damaged file, or another version."""
    values = read_json(path, KIND, VERSION, _REMEDY)
    try:
        given: dict[str, Any] = values["cost"]
        fields: dict[str, Any] = {k: math.inf if v is None and k != "attention" else v for k, v in given.items()}
        if fields["attention"] is not None:
            fields["attention"] = AttentionShape(**fields["attention"])
        for name in ("recompute_layers", "recompute_shares", "group_seconds"):
            fields[name] = tuple(tuple(entry) for entry in fields[name])
        cost = CostModel(**fields)
        numbers = (cost.linear_rate, cost.attention_rate, cost.node_bandwidth, cost.cluster_bandwidth)
        if not all(rate > 0 for rate in numbers) or cost.micro_batch_seconds < 0:
            raise ValueError("rates must be positive")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"cost model {path} is damaged ({error}); {_REMEDY}") from error
    return replace(cost, name=str(path))


def cost_file_of(table: Path) -> Path:
    """Where `hbp profile` puts the cost model fitted to a profile table: P.cost.json beside P.json."""
    return table.with_name(f"{table.name.removesuffix('.json')}.cost.json")


def cost_model(name: str) -> CostModel:
    """The shipped cost model `name`, or the one in a file whose name ends in .json.

    A plan names the cost model that balanced it; for one from a file that is the file's path as it was given.
    """
    if name in PRESETS or not name.endswith(".json"):
        return preset(name)
    return load(Path(name))
