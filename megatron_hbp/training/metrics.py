"""What a run writes down: one JSON line a step, and what each tier cost in all.

The file is made by the last rank (the one that prints Megatron-LM's losses): {"kind": "step", ...} and {"kind":
"validation", ...} lines as they happen, one {"kind": "summary", ...} line at the end. Times are host times: exact on
CPU; on CUDA the device runs behind them, and only whole steps mean something.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.planning.plan import Plan
from megatron_hbp.training.feed import DUMMY, MicroBatch


class RunMetrics:
    """Times micro-batches and steps; collects per tier."""

    def __init__(self, plan: Plan, path: Path | None):
        """`path` is where the JSON lines go; None writes nothing."""
        self.plan = plan
        self.path = path
        self._file: Any = None
        # rows: tiers, then dummies; columns: micro-batches, real local tokens, seconds
        self._per_tier = [[0.0, 0.0, 0.0] for _ in range(len(plan.tiers) + 1)]
        self._running: tuple[int, float] | None = None
        self._step_started = time.perf_counter()
        self._train_seconds = 0.0
        self._train_tokens = 0
        self._training = False

    # ------------------------------------------------------------ called around a step

    def start(self, *, training: bool) -> None:
        """A forward-backward pass over all micro-batches of a step begins."""
        self._training = training
        self._step_started = time.perf_counter()
        self._running = None

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
        step = iteration - 1
        packs = self.plan.pack_step == step
        tokens = int(self.plan.pack_tokens[packs].sum())
        self._train_tokens += tokens
        seconds = time.perf_counter() - self._step_started
        self._write(
            kind="step",
            iteration=iteration,
            steps=self.plan.num_steps,
            loss=_number(losses.get("lm loss")),
            learning_rate=learning_rate,
            grad_norm=_number(grad_norm),
            tokens=tokens,
            seconds=round(seconds, 4),
            cp_degrees=sorted({int(c) for c in self.plan.pack_cp[packs]}),
        )

    def log_validation(self, losses: dict[str, Any]) -> None:
        """One line for an evaluation."""
        self._write(kind="validation", loss=_number(losses.get("lm loss")))

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
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
