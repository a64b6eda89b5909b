"""Run pretrain_hbp.py on local ranks and follow its metrics file."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_hbp.errors import HbpError

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_hbp.py"


@dataclass(kw_only=True)
class Run:
    """The contents of the metrics file of a training run."""

    name: str
    log: Path
    metrics: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    validation_loss: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall time, without the first step (warm-up)."""
        later = self.steps[1:] or self.steps
        return sum(step["tokens"] for step in later) / sum(step["seconds"] for step in later)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of the metrics file."""
        if line["kind"] == "step":
            self.steps.append(line)
        elif line["kind"] == "validation":
            self.validation_loss = line["loss"]
        elif line["kind"] == "summary":
            self.summary = line


def train(name: str, flags: list[str], *, out: Path, num_ranks: int, num_steps: int, console: Console) -> Run:
    """Train one model to the end of its plan with a progress bar; Megatron-LM's own output goes to a log file.

    Raises:
        HbpError: the run ended with a non-zero exit code; the message names the log.
    """
    run = Run(name=name, log=out / f"{name}.log", metrics=out / f"{name}.jsonl")
    run.metrics.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "megatron_hbp.launch", "--standalone", "--nproc-per-node", str(num_ranks), str(PROGRAM),
        *flags, "--hbp-metrics", str(run.metrics),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HBP_PLATFORM": "cpu"}
    columns = (
        TextColumn(f"training {name:12}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with run.log.open("w", encoding="utf-8") as log, Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=num_steps, note=f"starting {num_ranks} ranks")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            for line in _lines(run.metrics, process):
                run.add(line)
                if line["kind"] == "step":
                    progress.update(task, completed=line["iteration"], note=f"loss {line['loss']:.3f}")
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if code:
        raise HbpError(f"training {name} ended with exit code {code}; its output is in {run.log}")
    return run


def _lines(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a file while a process is writing it."""
    position, rest = 0, ""
    while True:
        ended = process.poll() is not None
        if path.exists():
            with path.open(encoding="utf-8") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
            *complete, rest = rest.split("\n")
            yield from map(json.loads, complete)
        if ended:
            return
        time.sleep(0.2)
