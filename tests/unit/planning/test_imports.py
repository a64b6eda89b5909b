"""`planning/` runs on a laptop: numpy and the standard library, nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_hbp.planning

FILES = sorted(Path(megatron_hbp.planning.__file__).parent.rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def is_allowed(module: str) -> bool:
    own = module.startswith("megatron_hbp.planning") or module == "megatron_hbp.errors"
    return own or module.split(".")[0] in {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_numpy_and_the_standard_library(path):
    foreign = {module for module in imported_modules(path.read_text()) if not is_allowed(module)}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_outgrows_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_planning_and_its_command_do_not_load_torch():
    code = "import sys, megatron_hbp.planning, megatron_hbp.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
