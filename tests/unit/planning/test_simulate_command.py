"""`hbp simulate`, and the fit of rates to timings."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.calibrate import RATES, Timing, fit, predict
from benchmarks.lengths import generate
from megatron_hbp.cli import app
from megatron_hbp.errors import ConfigError, DataError, DiskError, PlanError
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.planfile import save
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.request import Request

LLAMA = preset("llama3.1-8b-h100")


def run(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "train.plan"
    lengths = generate("mix", num_samples=5000)
    tiers = parse_tiers("16384:cp1:full28,131072:cp8:full28")
    save(
        make_plan(Samples.of(lengths), Request(tiers=tiers, num_ranks=8, step_tokens=8 * 16384 * 8, slot_multiple=2)),
        path,
    )
    return path


def test_tables_json_and_pictures(plan_file, tmp_path):
    result = run(plan_file, "--nodes", 1, "--picture", tmp_path / "ranks.png")
    assert result.exit_code == 0, result.output
    assert "Time without computing" in result.stdout
    assert "headroom" in result.stdout
    result = run(plan_file, "--nodes", 2, "--pp", 2, "--virtual-stages", 2, "--json", "--picture", tmp_path / "pp.svg")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["gpu_days"] == pytest.approx(found["epoch_seconds"] * 16 / 86400)
    assert sum(step["seconds"] for step in found["steps"]) == pytest.approx(found["epoch_seconds"])
    assert found["idle"]["pipeline bubble"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.png", "pp.svg"}


def test_slower_links_cost_more(plan_file):
    epochs = [
        json.loads(run(plan_file, "--nodes", 1, "--json", *options).stdout)["epoch_seconds"]
        for options in ([], ["--node-bandwidth", 10])
    ]
    assert epochs[0] < epochs[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--nodes", 4], ConfigError, "the plan is for 8 data-parallel ranks, 32 GPUs"),
        (["--nodes", 1, "--cost", "tpu"], ConfigError, "unknown cost model"),
        (["--nodes", 1, "--step", 10**6], ConfigError, "the plan has steps 0 to"),
        (["--nodes", 1, "--gpu-memory", "inf"], ConfigError, "--gpu-memory inf: give a finite number"),
        (["--nodes", 1, "--node-bandwidth", "inf"], ConfigError, "--node-bandwidth inf: give a finite number"),
        (["--nodes", 1, "--picture", "/nowhere/at/all.png"], DiskError, "picture could not be written"),
        (["--nodes", 1, "--picture", "steps.txt"], DiskError, "use a .png or .svg"),
    ],
)
def test_mistakes_are_named(plan_file, options, error, message):
    result = run(plan_file, *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_no_plan(tmp_path):
    assert isinstance(run(tmp_path / "none.plan", "--nodes", 1).exception, PlanError)


def test_a_fit_finds_the_rates_that_made_the_timings():
    tiers = parse_tiers("8192:cp1,16384:cp2:full8,65536:cp8:full28,131072:cp16:full16")
    rows = [Timing(label=str(t), tier=t, seconds=1.0, sample_tokens=x) for t in tiers for x in (0.0, 2048.0, "mixed")]
    truth = replace(LLAMA, linear_rate=3e14, attention_rate=2e14, node_bandwidth=6e10, cluster_bandwidth=1e10,
                    micro_batch_seconds=0.4)  # fmt: skip
    seconds = predict(truth, rows, {"mixed": 5000.0})
    rows = [replace(row, seconds=value) for row, value in zip(rows, seconds.tolist(), strict=True)]
    found = fit(LLAMA, rows)
    assert [getattr(found.cost, name) for name in RATES] == pytest.approx(
        [getattr(truth, name) for name in RATES], rel=1e-4
    )
    assert found.lengths["mixed"] == pytest.approx(5000, rel=1e-4)
    assert np.abs(found.errors).max() < 1e-6
    inside = [row for row in rows if row.tier.cp_degree <= 8]
    assert fit(LLAMA, inside).spread["cluster_bandwidth"] == np.inf
    with pytest.raises(DataError, match="cannot determine"):
        fit(LLAMA, rows[:4])
