"""A fitted cost model as a JSON file: `hbp profile` writes it, `hbp plan --cost FILE.json` reads it."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AttentionShape
from megatron_hbp.planning.core.json_files import check_attention, check_numbers, is_number
from megatron_hbp.planning.cost.model import PRESETS, CostModel, preset
from megatron_hbp.planning.cost.profile_table import read_json, write_json

KIND = "hbp cost model"
VERSION = 2
_REMEDY = "fit it again with `hbp profile`, or name another with --cost"


def save(cost: CostModel, path: Path) -> None:
    """Write a cost model; infinite rates (nothing measured there) become null. Raises DiskError."""
    values = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(cost).items()}
    write_json({"kind": KIND, "version": VERSION, "cost": values}, path, "cost model", "--hbp-profile-out")


def load(path: Path) -> CostModel:
    """Read a cost model. Raises ConfigError for a missing or damaged file, or another version."""
    values = read_json(path, KIND, VERSION, _REMEDY)
    try:
        fields: dict[str, Any] = dict(values["cost"])
        _check(fields)
        fields |= {name: math.inf for name in _RATES if fields[name] is None}
        if fields["attention"] is not None:
            fields["attention"] = AttentionShape(**fields["attention"])
        for name in _LISTS:
            fields[name] = tuple(tuple(entry) for entry in fields[name])
        cost = CostModel(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"cost model {path} is damaged ({error}); {_REMEDY}") from error
    return replace(cost, name=str(path))


_RATES = ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth")
_LISTS = {"recompute_layers": (int, int), "recompute_shares": (str, float, float),
          "recompute_seconds": (str, float), "group_seconds": (int, float)}  # fmt: skip
"""Field -> what an entry holds."""


def _check(fields: dict[str, Any]) -> None:
    """Raise ValueError naming the first field that cannot be."""
    check_numbers(fields, ("num_layers", "node_size", "tensor_parallel", "max_cp_degree"), least=1, whole=True)
    check_numbers(fields, ("linear_flops", "attention_flops", "micro_batch_seconds", "step_seconds"))
    check_numbers(fields, _RATES, none=True)
    for name in _RATES:
        if fields[name] == 0:
            raise ValueError(f"{name} is 0: nothing would ever be done")
    if fields["attention"] is not None:
        check_attention(fields["attention"])
    for name, kinds in _LISTS.items():
        for entry in fields[name]:
            fits = isinstance(entry, list) and len(entry) == len(kinds) and all(
                isinstance(value, str) if kind is str else is_number(value, whole=kind is int)
                for value, kind in zip(entry, kinds, strict=True)
            )  # fmt: skip
            if not fits:
                raise ValueError(f"{name} has an entry {entry!r}")


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
