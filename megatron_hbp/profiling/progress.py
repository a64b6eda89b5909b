"""A bar with the time left on a terminal, a line per row elsewhere. On rank 0, on stderr."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, track
from rich.progress import Progress as Bar

from megatron_hbp.planning.core.model import ModelSpec
from megatron_hbp.planning.cost.profile_table import Measurement, Setting

FIXED_TOKENS = 512
"""A row costs at least what so many tokens cost: launches, and the agreement of the ranks."""


def track_items[T](items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar and the time left where rank 0 has a terminal."""
    console = Console(stderr=True)
    show = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return track(items, description=what, console=console, disable=not show)


@contextlib.contextmanager
def progress(
    every: Sequence[Setting], missing: Sequence[Setting], model: ModelSpec, *, show: bool
) -> Iterator[Callable[[Measurement], None]]:
    """What is to be called with each row that is done.

    The time left goes by the work of the rows left, which lengths set a thousandfold apart.
    """
    console, numbers = Console(stderr=True), itertools.count(len(every) - len(missing))

    def work(setting: Setting) -> float:
        linear = (setting.local_tokens + FIXED_TOKENS) * model.linear_flops()
        return linear + setting.squares / setting.cp_degree * 3.5 * model.attention_flops

    columns = (
        TextColumn("profiling"), BarColumn(), TextColumn("{task.fields[rows]} rows"),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Bar(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        done = f"{next(numbers)}/{len(every)}"
        task = bar.add_task("rows", total=sum(map(work, missing)), rows=done, note="")
        if show and len(missing) < len(every):
            console.print(f"{done} rows are in the table already", highlight=False)

        def advance(row: Measurement) -> None:
            rows, result = f"{next(numbers)}/{len(every)}", row.why if row.seconds is None else f"{row.seconds:.3f} s"
            bar.update(task, advance=work(row.setting), rows=rows, note=f"{row.setting}: {result}")
            if show and not console.is_terminal:
                print(f"> hbp profile: row {rows}: {row.setting}: {result}", flush=True)

        yield advance
