"""The packages stand one on another: data and planning below, then the model, the feed, a run, and the programs."""

import ast
from pathlib import Path

import megatron_hbp

ROOT = Path(megatron_hbp.__file__).parent
ORDER = (
    "errors", "data", "planning", "families", "report", "platform", "parallel", "model", "feed", "runtime", "training",
    "profiling", "launch", "demo", "commands", "cli",
)  # fmt: skip
"""A package may import those before it; imports inside functions count."""


def imports_of(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names if node.module}
    return {name.split(".")[1] for name in names if name.startswith("megatron_hbp.") and not name.endswith("__")}


def test_packages_import_those_below_them():
    upwards = []
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).with_suffix("").parts[0]
        if package not in ("__init__", "__main__"):
            below = ORDER[: ORDER.index(package)]
            upwards += [f"{path.relative_to(ROOT)}: {name}" for name in imports_of(path) - {package, *below}]
    assert not upwards
