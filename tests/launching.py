"""Start gloo ranks for a test: one launch costs seconds, so a launch runs many cases and returns all their results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(module: str, *args: str, ranks: int, tmp_path: Path, timeout: float = 500) -> Any:
    """Run `python -m module *args RESULT.json` on `ranks` gloo ranks; return what rank 0 wrote to RESULT.json."""
    result = tmp_path / f"{module.rsplit('.', 1)[-1]}.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", module, *args, str(result),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(result.read_text())
