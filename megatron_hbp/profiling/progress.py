"""A bar with the time left on a terminal, a line per row elsewhere. On rank 0, on stderr."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, track
from rich.progress import Progress as Bar

from megatron_hbp.planning.core.model import ModelSpec
from megatron_hbp.planning.cost.profile_table import Measurement, Setting

FIXED_TOKENS = 512
"""A row costs at least what so many tokens cost: launches, and the agreement of the ranks."""


def counted[T](items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar and the time left where rank 0 has a terminal."""
    console = Console(stderr=True)
    show = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return track(items, description=what, console=console, disable=not show)


class Progress:
    """Counts rows; the time left goes by the work of the rows left, which lengths set a thousandfold apart."""

    def __init__(self, every: Sequence[Setting], missing: Sequence[Setting], model: ModelSpec, *, show: bool):
        self._model, self._show, self._every, self._done = model, show, len(every), len(every) - len(missing)
        self._console = Console(stderr=True)
        self._total = sum(map(self._work, missing))
        columns = (
            TextColumn("profiling"), BarColumn(), TextColumn("{task.fields[rows]} rows"),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        self._bar = Bar(*columns, console=self._console, disable=not (show and self._console.is_terminal))
        self._task = self._bar.add_task("rows", total=self._total, rows=self._count(), note="")
        if show and self._done:
            self._console.print(f"{self._done} of {self._every} rows are in the table already", highlight=False)

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def advance(self, row: Measurement) -> None:
        """A row is done."""
        self._done += 1
        result = f"{row.seconds:.3f} s" if row.seconds is not None else row.why
        note = f"{row.setting}: {result}"
        self._bar.update(self._task, advance=self._work(row.setting), rows=self._count(), note=note)
        if self._show and not self._console.is_terminal:
            print(f"> hbp profile: row {self._count()}: {note}", flush=True)

    def _count(self) -> str:
        return f"{self._done}/{self._every}"

    def _work(self, setting: Setting) -> float:
        linear = (setting.local_tokens + FIXED_TOKENS) * self._model.linear_flops()
        return linear + setting.squares / setting.cp_degree * 3.5 * self._model.attention_flops
