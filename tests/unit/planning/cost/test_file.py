"""Cost models as files: there and back, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost.presets import PRESETS, preset
from tests.unit.planning.profiles import PLANTED

LAYER = ("model", "layers", 0, 1)
WRONG: list[tuple[tuple[str | int, ...], Any]] = [
    (("machine", "linear_rate"), -1.0), (("machine", "linear_rate"), 0), (("machine", "linear_rate"), True),
    (("machine", "node_size"), -1), (("machine", "node_size"), 0), (("machine", "memory_reserve"), None),
    (("machine", "overlap"), "x"), (("machine", "cluster_bandwidth"), "1e9"),
    (("model", "hidden"), 0), (("model", "vocabulary"), 1.5), (("model", "layers"), []),
    (("model", "layers", 0, 0), 0), (("model", "layers", 0, 0), "x"),
    ((*LAYER, "attention"), {}), ((*LAYER, "attention", "num_query_heads"), "x"),
    ((*LAYER, "attention", "kv_latent"), -1), ((*LAYER, "attention", "kind"), "none"),
    ((*LAYER, "feed_forward", "width"), -1), ((*LAYER, "feed_forward"), None),
    (("step_seconds",), None), (("step_seconds",), float("nan")), (("supervised",), -0.1),
    (("tensor_parallel",), 0), (("linear_rate_without_experts",), "x"), (("recompute_ranks",), -1),
    (("recompute_layers",), [[1024]]), (("recompute_layers",), [[1024, 1.5]]), (("recompute_shares",), [["full", 1]]),
    (("recompute_seconds",), [["full", -1]]), (("recompute_seconds",), [["full"]]),
    (("group_seconds",), [[4, float("nan")]]), (("group_seconds",), [[4, -99]]), (("group_seconds",), 3),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value"), WRONG, ids=lambda part: str(part)[-40:])
def test_a_field_that_cannot_be_is_named(tmp_path, keys, value):
    path = tmp_path / "c.json"
    cost_file.save(PLANTED, path)
    values = json.loads(path.read_text())
    inside = values["cost"]
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"is damaged .*fit it again with `hbp profile`") as refused:
        cost_file.load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("cost", PRESETS.values(), ids=PRESETS)
def test_json_values_give_the_same_cost_model(cost):
    assert cost_file.from_json(json.loads(json.dumps(cost_file.to_json(cost))), "it", "do") == cost


def test_nothing_measured_across_nodes_is_no_json_infinity():
    cost = PLANTED.with_machine(cluster_bandwidth=math.inf)
    text = json.dumps(cost_file.to_json(cost), allow_nan=False)
    assert cost_file.from_json(json.loads(text), "it", "do") == cost


def test_a_cost_model_goes_to_a_file_and_back(tmp_path):
    path = tmp_path / "c.json"
    cost = replace(PLANTED.with_machine(cluster_bandwidth=math.inf), group_seconds=((2, 0.1),))
    cost_file.save(cost, path)
    assert cost_file.cost_model(str(path)) == cost
    assert cost_file.cost_model("llama3.1-8b-h100") == preset("llama3.1-8b-h100")
    (tier,) = parse_tiers("1024:cp2")
    assert cost.tier_cost(tier).fixed == pytest.approx(0.12)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda v: v | {"cost": {}}, "is damaged"),
        (lambda v: v | {"version": 2}, "has version 2, this program reads 3; fit it again"),
        (lambda v: v | {"kind": "hbp profile table"}, "is not a cost model"),
    ],
    ids=["empty", "version", "kind"],
)
def test_a_bad_cost_file_says_why(tmp_path, change, says):
    path = tmp_path / "c.json"
    cost_file.save(PLANTED, path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=says):
        cost_file.cost_model(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        cost_file.cost_model(str(tmp_path / "absent.json"))


def test_a_cost_model_lies_beside_its_profile():
    assert cost_file.cost_file_of(Path("a/h100.json")) == Path("a/h100.cost.json")
    assert cost_file.cost_file_of(Path("h100")) == Path("h100.cost.json")


def test_a_name_that_is_neither_a_preset_nor_a_file():
    with pytest.raises(ConfigError, match=r"unknown cost model 'tpu'; there are deepseek-v2-h100, .* or a FILE.json"):
        cost_file.cost_model("tpu")
