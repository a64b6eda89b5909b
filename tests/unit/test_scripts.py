"""The SLURM script with stand-ins for srun, scontrol and torchrun; the recipes against Megatron-LM's own parser."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hbp.families import MODELS, model_flags

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
RUN_FLAGS = {"--bf16", "--use-distributed-optimizer"}

STAND_INS = {
    "scontrol": "echo node7; echo node8",
    "srun": 'printf "%s\\n" "$@" >"$SEEN"; while [[ "$1" == --* ]]; do shift; done; "$@"',
    "torchrun": 'echo "$CUDA_DEVICE_MAX_CONNECTIONS" >"$SEEN.queues"; [[ -z "${WRITES:-}" ]] || echo "$WRITES" '
    '>"$HBP_EXIT_CODE_FILE"; exit "${ENDS:-0}"',
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A pretended SLURM job; `run` returns exit code, stderr, and the words that srun was given."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **changes: str | None) -> tuple[int, str, list[str]]:
        environment = self.environment | {name: value for name, value in changes.items() if value is not None}
        for name in (name for name, value in changes.items() if value is None):
            environment.pop(name, None)
        done = subprocess.run(
            ["bash", str(SBATCH), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        seen = self.folder / "seen"
        return done.returncode, done.stderr, seen.read_text().splitlines() if seen.exists() else []


@pytest.fixture
def job(tmp_path) -> Job:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "HBP_RUN_DIR": str(tmp_path / "run"),
    }
    return Job(folder=tmp_path, environment=environment)


def test_the_launch_is_one_torchrun_a_node_with_one_rendezvous(job):
    code, _, words = job.run("--", "--hbp-plan", "a plan", "--bf16")
    assert code == 0
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:24242"} <= set(words)
    run = job.environment["HBP_RUN_DIR"]  # the user's flags go last, and win
    program = [str(ROOT / "pretrain_hbp.py"), "--save", run, "--load", run, "--hbp-plan", "a plan", "--bf16"]
    assert words[-len(program) :] == program
    assert not any("container" in word for word in words)
    assert (job.folder / "seen.queues").read_text() == "1\n"


def test_a_container_is_given_its_mounts(job):
    code, _, words = job.run("--", "--bf16", HBP_CONTAINER_IMAGE="hbp.sqsh", HBP_CONTAINER_MOUNTS="/data:/data")
    assert code == 0
    run = job.environment["HBP_RUN_DIR"]
    assert {"--container-image=hbp.sqsh", f"--container-mounts={run}:{run},/data:/data"} <= set(words)
    assert "/opt/megatron-hbp/pretrain_hbp.py" in words


@pytest.mark.parametrize(
    ("ends", "writes", "expected"),
    [("0", None, 0), ("1", "75", 75), ("1", "78", 78), ("1", None, 1), ("137", None, 137), ("1", "nonsense", 1)],
)
def test_the_programs_exit_code_is_carried_over(job, ends, writes, expected):
    code, _, _ = job.run("--", "--bf16", ENDS=ends, WRITES=writes)
    assert code == expected


def test_the_code_of_an_earlier_try_does_not_count(job):
    assert job.run("--", "--bf16", ENDS="1", WRITES="75")[0] == 75
    assert job.run("--", "--bf16", ENDS="1")[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"HBP_RUN_DIR": None}, "HBP_RUN_DIR is not set"),
        ({"SLURM_JOB_ID": None}, "start it with sbatch"),
        ({"SLURM_GPUS_ON_NODE": None}, "--gpus-per-node"),
        ({"HBP_GPUS_PER_NODE": "many"}, "GPUs per node unknown ('many')"),
        ({"HBP_CONTAINER_MOUNTS": "/data:/data"}, "without HBP_CONTAINER_IMAGE"),
        ({"HBP_PROGRAM": "/nowhere/pretrain_hbp.py"}, "/nowhere/pretrain_hbp.py is not there"),
        ({"HBP_RUN_DIR": "/dev/null/run"}, "cannot write to /dev/null/run"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(job, changes, message):
    code, said, words = job.run("--", "--bf16", **changes)
    assert (code, words) == (78, [])
    assert message in said.splitlines()[-1] and said.splitlines()[-1].startswith("train.sbatch: ")


@pytest.mark.parametrize("arguments", [(), ("--bf16",), ("--",)])
def test_arguments_follow_two_dashes(job, arguments):
    code, said, words = job.run(*arguments)
    assert (code, words) == (78, []) and "--" in said


def source(recipe: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Source a recipe with `python` and print its flags, one word per line."""
    command = f'source {recipe} || exit $?; printf "%s\\n" "${{MODEL_FLAGS[@]}}"'
    environment = os.environ | {"HBP_PYTHON": python}
    return subprocess.run(
        ["bash", "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_recipes_are_the_families_and_hold_flags_that_megatron_knows():
    """One process for all: its import of megatron.training takes seconds."""
    flags = {}
    for recipe in RECIPES:
        flags[recipe.stem] = source(recipe, sys.executable).stdout.splitlines()
        model = model_flags(recipe.stem)
        assert flags[recipe.stem][: len(model)] == model
        assert set(flags[recipe.stem]) >= RUN_FLAGS
    assert set(flags) == set(MODELS)
    parse = (
        "import argparse, sys; from megatron.training.arguments import add_megatron_arguments;"
        "parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=True); add_megatron_arguments(parser);"
        f"[parser.parse_args(words) for words in {list(flags.values())!r}]"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", parse], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_without_the_package_says_so(recipe):
    done = source(recipe, "/nowhere/python")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines()[-1] == (
        f"recipes/{recipe.name}: /nowhere/python cannot run megatron_hbp; set HBP_PYTHON"
    )
