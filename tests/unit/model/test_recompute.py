"""Recompute by micro-batch on real tiny models: flags, exact gradients, memory, contexts. One process runs it all."""

import json
import os
import subprocess
import sys

import pytest

from tests.launching import ROOT

MODULES = {
    "dense": ["core_attn", "layernorm", "mlp"],
    "moe": ["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"],
}
CASES = [
    "switch_sets_and_clears",
    "switch_knows_configs_that_were_copied",
    "policies_are_checked_when_the_model_is_built",
    "a_policy_that_is_set_costs_nothing",
    "stages_share_the_layers",
    "capture_is_installed_once",
    "both_checkpoints_keep_the_context",
    "backward_recomputes_in_the_forwards_context",
    "fused_rotary_of_latent_attention_is_off",
    "fused_rotary_of_grouped_queries_takes_local_positions",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    store = tmp_path_factory.mktemp("recompute") / "store"
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.worker", str(store)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("case", CASES)
def test_case(results, case):
    assert results["cases"][case] == ""


def test_every_case_is_listed(results):
    assert sorted(results["cases"]) == sorted(CASES)


@pytest.mark.parametrize("policy", ["none", "all", "full1", "full3"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_gradients_are_bit_identical(results, model, policy):
    assert results["gradients"][model][policy] is False


@pytest.mark.parametrize("model, module", [(model, module) for model, each in MODULES.items() for module in each])
def test_each_module_saves_memory_and_changes_no_gradient(results, model, module):
    assert results["gradients"][model][module] is False
    assert results["bytes"][model][module] < results["bytes"][model]["none"]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_more_recompute_keeps_less(results, model):
    kept = results["bytes"][model]
    assert kept["none"] > kept["core_attn"] > kept["all"] > kept["full3"]
    assert kept["none"] > kept["full1"] > kept["full3"]
    assert kept["full3"] < 0.35 * kept["none"]
