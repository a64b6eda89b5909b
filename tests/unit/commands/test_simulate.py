"""`hbp simulate`."""

import json

import pytest

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError, DiskError, PlanError
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.planfile import save
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.simulate.simulator import simulate
from tests.unit.commands.running import done, hbp, refused
from tests.unit.planning.plans import plan_of

DEEPSEEK = preset("deepseek-v2-h100")


def made(slot_multiple=1, **options):
    return plan_of(
        generate("mix", num_samples=5000), "16384:cp1:full28,131072:cp8:full28", num_ranks=8,
        step_tokens=8 * 16384 * 8, slot_multiple=slot_multiple, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "train.plan"
    save(made(slot_multiple=2), path)
    return path


def values_of(*arguments):
    result = hbp("simulate", *arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def test_tables_json_and_pictures(plan_file, tmp_path):
    output = done("simulate", plan_file, "--nodes", 1, "--picture", tmp_path / "ranks.png")
    assert "Time without compute" in output and "headroom" in output
    pipeline = ["--nodes", 2, "--pp", 2, "--virtual-stages", 2]
    found = values_of(plan_file, *pipeline, "--picture", tmp_path / "pp.svg")
    assert found["gpu_days"] == pytest.approx(found["epoch_seconds"] * 16 / 86400)
    assert sum(step["seconds"] for step in found["steps"]) == pytest.approx(found["epoch_seconds"])
    assert found["idle"]["pipeline bubble"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.png", "pp.svg"}


def test_slower_links_cost_more(plan_file):
    fast, slow = (values_of(plan_file, "--nodes", 1, *more)["epoch_seconds"] for more in ([], ["--node-bandwidth", 10]))
    assert fast < slow


def test_switches(plan_file):
    hidden, shown, sharded = (
        values_of(plan_file, "--nodes", 1, *more)["idle"]["gradient sync"]
        for more in ([], ["--no-overlap-gradients"], ["--fully-sharded"])
    )
    assert sharded == 0 <= hidden < shown


def test_memory_of_another_gpu(plan_file):
    assert values_of(plan_file, "--nodes", 1, "--gpu-memory", 141)["memory"]["limit"] == 141e9
    assert "MISSING: the plan does not fit" in done("simulate", plan_file, "--nodes", 1, "--gpu-memory", 40)


@pytest.mark.parametrize("cut", [{}, {"tp": 2}, {"tp": 2, "ep": 8}, {"ep": 4}, {"pp": 2, "tp": 4}])
def test_the_command_says_what_the_simulator_says(tmp_path, cut):
    """Placed in the command first, the experts' rate lost the collectives of tensor parallelism."""
    plan = made(cost=DEEPSEEK)
    save(plan, tmp_path / "PLAN")
    nodes = cut.get("tp", 1) * cut.get("pp", 1)
    flags = [word for name, value in cut.items() for word in (f"--{name}", value)]
    expected = simulate(plan, DEEPSEEK, Topology(num_nodes=nodes, **cut))
    found = values_of(tmp_path / "PLAN", "--nodes", nodes, *flags)
    assert found["epoch_seconds"] == pytest.approx(expected.epoch_seconds)
    assert found["idle"] == pytest.approx(expected.idle())
    assert expected.memory is not None and found["memory"]["peak"] == expected.memory.peak


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--nodes", 4], ConfigError, "the plan is for 8 data-parallel ranks, 32 GPUs"),
        (["--nodes", 1, "--cost", "tpu"], ConfigError, "unknown cost model"),
        (["--nodes", 1, "--step", 10**6], ConfigError, "the plan has steps 0 to"),
        (["--nodes", 1, "--gpu-memory", "inf"], ConfigError, "--gpu-memory inf: give a finite number"),
        (["--nodes", 1, "--node-bandwidth", "inf"], ConfigError, "--node-bandwidth inf: give a finite number"),
        (["--nodes", 1, "--overlap", 2], ConfigError, "the overlap is a share between 0 and 1, got 2.0"),
        (["--nodes", 1, "--picture", "/nowhere/at/all.png"], DiskError, "picture could not be written"),
        (["--nodes", 1, "--picture", "steps.txt"], DiskError, "use a .png or .svg"),
    ],
)
def test_mistakes_are_named(plan_file, options, error, message):
    raised = refused("simulate", plan_file, *options)
    assert isinstance(raised, error) and message in str(raised)


def test_no_plan(tmp_path):
    assert isinstance(refused("simulate", tmp_path / "none.plan", "--nodes", 1), PlanError)
