"""What a run writes down: one JSON line a step, and what each tier cost in all.

The file is made by the last rank (the one that prints Megatron-LM's losses): {"kind": "step", ...} and {"kind":
"validation", ...} lines as they happen, one {"kind": "summary", ...} line at the end. Times are host times: exact on
CPU; on CUDA the device runs behind them, and only whole steps mean something. There a step's line is written when the
next one is known: reading its loss at once would make the host wait for the device in every step.
"""

import atexit
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.feed.feed import DUMMY, MicroBatch
from megatron_hbp.planning.core.plan import Plan


class RunMetrics:
    """Times micro-batches and steps; collects per tier."""

    def __init__(self, plan: Plan, path: Path | None):
        """`path` is where the JSON lines go; None writes nothing."""
        self.plan, self.path = plan, path
        self._late: dict[str, Any] | None = None  # a line whose numbers are still on their way from the device
        # rows: tiers, then dummies; columns: micro-batches, real local tokens, seconds
        self._per_tier = [[0.0, 0.0, 0.0] for _ in range(len(plan.tiers) + 1)]
        self._running: tuple[int, float] | None = None
        self._step_started = time.perf_counter()
        self._train_seconds, self._train_tokens = 0.0, 0
        self._training = False
        atexit.register(self._write_late)

    # ------------------------------------------------------------ called around a step

    def start(self, *, training: bool) -> None:
        """A forward-backward pass over all micro-batches of a step begins."""
        self._training, self._running = training, None
        self._step_started = time.perf_counter()

    def observe(self, micro_batch: MicroBatch) -> None:
        """A micro-batch begins; with the schedule without pipelining, that ends the one before, backward included."""
        if not self._training:
            return
        self._close()
        row = micro_batch.tier if micro_batch.tier != DUMMY else len(self.plan.tiers)
        self._per_tier[row][0] += 1
        self._per_tier[row][1] += micro_batch.num_local_tokens
        self._running = (row, time.perf_counter())

    def finish(self) -> None:
        """The forward-backward pass has ended."""
        if self._training:
            self._close()
            self._train_seconds += time.perf_counter() - self._step_started

    def _close(self) -> None:
        if self._running is not None:
            row, started = self._running
            self._per_tier[row][2] += time.perf_counter() - started

    # ------------------------------------------------------------ written down

    def log_step(self, *, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        """One line for the training step that ended as `iteration` (1-based)."""
        packs = self.plan.pack_step == iteration - 1
        tokens = int(self.plan.pack_tokens[packs].sum())
        self._train_tokens += tokens
        self._write(
            kind="step",
            iteration=iteration,
            steps=self.plan.num_steps,
            loss=losses.get("lm loss"),
            learning_rate=learning_rate,
            grad_norm=grad_norm if grad_norm is None or isinstance(grad_norm, torch.Tensor) else float(grad_norm),
            tokens=tokens,
            seconds=round(time.perf_counter() - self._step_started, 4),
            cp_degrees=sorted({int(c) for c in self.plan.pack_cp[packs]}),
        )

    def log_validation(self, losses: dict[str, Any]) -> None:
        """One line for an evaluation."""
        self._write(kind="validation", loss=losses.get("lm loss"))
        self._write_late()

    def summarise(self, dp_group: dist.ProcessGroup) -> None:
        """The last line: totals per tier over the data-parallel ranks. Collective over `dp_group`."""
        table = torch.tensor(self._per_tier, dtype=torch.float64).to(torch.cuda.current_device())
        dist.all_reduce(table, group=dp_group)
        names = [str(tier) for tier in self.plan.tiers] + ["dummy"]
        tiers = [
            {"tier": name, "micro_batches": int(count), "tokens": int(tokens), "rank_seconds": round(seconds, 3)}
            for name, (count, tokens, seconds) in zip(names, table.tolist(), strict=True)
            if count
        ]
        self._write(
            kind="summary",
            tiers=tiers,
            train_tokens=self._train_tokens,
            train_seconds=round(self._train_seconds, 3),
            plan_hash=self.plan.hash,
        )

    def _write(self, **line: Any) -> None:
        if self.path is None or dist.get_rank() != dist.get_world_size() - 1:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._write_late()
        self._late = {key: _reader(value) if isinstance(value, torch.Tensor) else value for key, value in line.items()}
        if not any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in line.values()):
            self._write_late()

    def _write_late(self) -> None:
        if self._late is None:
            return
        assert self.path is not None
        line, self._late = {key: value() if callable(value) else value for key, value in self._late.items()}, None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _reader(value: torch.Tensor) -> Callable[[], float]:
    """Start copying a number to the host; what is returned waits for it, which a step later is no wait."""
    if value.device.type != "cuda":
        return lambda: float(value)
    on_host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    on_host.copy_(value.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return float(on_host)

    return read
