"""`planning/` runs on a laptop: numpy and the standard library, nothing else; its rooms stand one on another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_hbp.planning

ROOT = Path(megatron_hbp.planning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = {
    "core": set(),
    "cost": {"core"},
    "packing": {"core"},
    "request": {"core", "cost"},
    "schedule": {"core", "cost", "packing", "request"},
    "planner": {"core", "packing", "request", "schedule"},
    "reschedule": {"core", "cost", "request", "schedule"},
    "measure": {"core", "cost"},
    "simulate": {"core", "cost", "measure"},
    "select": {"core", "cost", "packing", "measure", "request", "planner"},
    "peers": {"core", "cost", "packing", "measure", "request"},
    "compare": {"core", "measure", "peers", "planner", "request"},
    "__init__": {"core", "planner", "request"},
}
"""Room (a folder, or a file beside them) -> what it imports; each only those above it."""


def imported_modules(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def is_allowed(module: str) -> bool:
    own = module.startswith("megatron_hbp.planning.") or module == "megatron_hbp.errors"
    return own or module.split(".")[0] in {"numpy", *sys.stdlib_module_names}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_numpy_and_the_standard_library(path):
    foreign = {module for module in imported_modules(path.read_text()) if not is_allowed(module)}
    assert not foreign


def test_rooms_import_rooms_below_them():
    found: dict[str, set[str]] = {}
    for path in FILES:
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        own = [name.split(".") for name in imported_modules(path.read_text()) if name.startswith("megatron_hbp.pl")]
        found.setdefault(room, set()).update(parts[2] for parts in own if parts[2] != room)
    assert found == ROOMS
    order = list(ROOMS)
    assert all(order.index(below) < order.index(room) for room, rooms in ROOMS.items() for below in rooms)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_outgrows_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["planning", "families", "commands.plan", "commands.simulate"])
def test_planning_and_its_commands_do_not_load_torch(module):
    code = f"import sys, megatron_hbp.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
