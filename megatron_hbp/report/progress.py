"""Progress bars over bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def byte_progress(description: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are done; yields the function to call with the bytes done since its last call.

    Nothing is shown where the console is not a terminal.
    """
    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
