"""A cost model as JSON: in a file of `hbp profile`, and in the header of every plan that it balanced."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.json_files import check_numbers, is_number, read_json, write_json
from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.core.model import AttentionKind, AttentionShape, FeedForward, Layer, ModelSpec
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.presets import PRESETS, preset

KIND = "hbp cost model"
VERSION = 3
_REMEDY = "fit it again with `hbp profile`, or name another with --cost"

_RATES = ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth", "memory_bandwidth", "memory")
"""Of a machine; infinite ones (nothing measured there) are null in JSON."""
_LISTS = {
    "recompute_layers": (int, int),
    "recompute_shares": (str, float, float),
    "recompute_seconds": (str, float),
    "group_seconds": (int, float),
}
"""Field -> what an entry holds."""


def save(cost: CostModel, path: Path) -> None:
    """Write a cost model. Raises DiskError."""
    write_json({"kind": KIND, "version": VERSION, "cost": to_json(cost)}, path, "cost model", "--hbp-profile-out")


def load(path: Path) -> CostModel:
    """Read a cost model. Raises ConfigError for a missing or damaged file, or another version."""
    values = read_json(path, KIND, VERSION, _REMEDY)
    return from_json(values.get("cost"), f"cost model {path}", _REMEDY)


def to_json(cost: CostModel) -> dict[str, Any]:
    """JSON values of a cost model."""
    values = asdict(cost)
    machine = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in values["machine"].items()}
    return values | {"machine": machine} | {name: [list(entry) for entry in values[name]] for name in _LISTS}


def from_json(values: Any, what: str, remedy: str) -> CostModel:
    """The cost model of JSON values. Raises ConfigError naming `what` where they are not those of one."""
    try:
        found: dict[str, Any] = dict(values)
        _check(found)
        machine = dict(found["machine"])
        machine |= {name: math.inf for name in _RATES if machine[name] is None}
        found |= {"machine": Machine(**machine), "model": model_from_json(found["model"])}
        found |= {name: tuple(tuple(entry) for entry in found[name]) for name in _LISTS}
        return CostModel(**found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{what} is damaged ({error}); {remedy}") from error


def model_from_json(values: Mapping[str, Any]) -> ModelSpec:
    """A model specification from JSON values. Raises ValueError, KeyError or TypeError."""
    check_numbers(values, ("hidden", "vocabulary"), least=1, whole=True)
    layers = []
    for count, layer in values["layers"]:
        check_numbers({"number of layers": count}, ("number of layers",), least=1, whole=True)
        attention, feed_forward = layer["attention"], layer["feed_forward"]
        heads = ("num_query_heads", "num_kv_heads", "qk_width", "v_width")
        check_numbers(attention, heads, least=1, whole=True)
        check_numbers(attention, ("q_latent", "kv_latent", "rope_width"), whole=True)
        check_numbers(feed_forward, [field.name for field in fields(FeedForward)], whole=True)
        if attention["kind"] not in get_args(AttentionKind):
            raise ValueError(f"attention kind is {attention['kind']!r}")
        layers.append((count, Layer(attention=AttentionShape(**attention), feed_forward=FeedForward(**feed_forward))))
    if not layers:
        raise ValueError("the model has no layers")
    return ModelSpec(**dict(values) | {"layers": tuple(layers)})


def _check(values: dict[str, Any]) -> None:
    """Raise ValueError naming the first field that cannot be."""
    check_numbers(values, ("tensor_parallel",), least=1, whole=True)
    check_numbers(values, ("recompute_ranks",), whole=True)
    check_numbers(values, ("micro_batch_seconds", "step_seconds", "supervised"))
    check_numbers(values, ("linear_rate_without_experts",), none=True)
    machine = values["machine"]
    check_numbers(machine, ("node_size",), least=1, whole=True)
    check_numbers(machine, _RATES, none=True)
    check_numbers(machine, ("memory_reserve", "overlap"))
    for name in _RATES:
        if machine[name] == 0:
            raise ValueError(f"{name} is 0: nothing would ever be done")
    for name, kinds in _LISTS.items():
        for entry in values[name]:
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
    """The shipped cost model `name`, or the one in a file whose name ends in .json."""
    return preset(name) if name in PRESETS or not name.endswith(".json") else load(Path(name))
