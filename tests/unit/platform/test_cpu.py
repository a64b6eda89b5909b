"""Every patch of the platform layer by name: needed, answering, and values unchanged. In a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_hbp.platform import cpu
from tests.launching import ROOT


def python(*arguments: str) -> str:
    """Standard output of a Python process that sees no CUDA device."""
    environment = {name: value for name, value in os.environ.items() if name != "HBP_PLATFORM"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, str]]:
    lines = python("-m", "tests.unit.platform.worker").splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.mark.parametrize("name", [patch.name for patch in cpu.PATCHES])
def test_patch_answers(results, name):
    assert name in results, f"write a case for patch {name} in worker.py"
    assert results[name]["after"] == ""


@pytest.mark.parametrize("name", [patch.name for patch in cpu.PATCHES])
def test_patch_is_needed(results, name):
    assert results[name]["before"] != "", f"Megatron-LM and torch manage without patch {name}: drop it"


def test_flags_are_megatrons(results):
    assert results["flags"] == {"backend": "gloo", "impl": "local"}


def test_importing_applies_nothing():
    """Other tests of this process run on an unpatched torch."""
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not hasattr(torch.zeros, "__wrapped__")


@pytest.mark.parametrize(
    "available, asked, expected", [(False, None, True), (True, None, False), (True, "cpu", True), (True, "cuda", False)]
)
def test_wanted(monkeypatch, available, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("HBP_PLATFORM", raising=False)
    if asked is not None:
        monkeypatch.setenv("HBP_PLATFORM", asked)
    assert cpu.is_needed() is expected


def test_list_of_patches(capsys):
    cpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [patch.name for patch in cpu.PATCHES]
    assert all(patch.why in line for patch, line in zip(cpu.PATCHES, lines, strict=True))


WITH_CUDA = """
import os, sys, torch
torch.cuda.is_available = lambda: True
from megatron_hbp.runtime import program
assert program.platform_flags() == []
assert "megatron_hbp.platform.cpu" not in sys.modules
assert torch.zeros(1).type() == "torch.FloatTensor"
os.environ["HBP_PLATFORM"] = "cpu"
flags = program.platform_flags()
from megatron_hbp.platform import cpu
assert flags == list(cpu.FLAGS) and torch.zeros(1).type() == "torch.cuda.FloatTensor"
print("as it should be")
"""


def test_with_cuda_the_layer_is_not_even_imported():
    assert "as it should be" in python("-c", WITH_CUDA)
