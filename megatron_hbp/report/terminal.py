"""Where tables go, and what they look like."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

LEAST_WIDTH = 80
"""Columns that our tables fit: a narrower terminal breaks their lines, but shows every digit."""


def table_console() -> Console:
    """A console as wide as its terminal; 80 columns in a file, a pipe or a narrower terminal."""
    console = Console()
    return console if console.width >= LEAST_WIDTH else Console(width=LEAST_WIDTH)


def plain_table(title: str, headings: Sequence[str], *, left: int = 1, caption: str = "") -> Table:
    """An empty table without vertical lines, after a blank line; the first `left` columns are text, the others numbers.

    Text is broken where the table would be wider than the console, numbers never are. Headings of numbers break at
    their newlines alone.
    """
    table = Table(
        title=f"\n{title}", title_justify="left", caption=caption or None, caption_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True,
    )  # fmt: skip
    for index, heading in enumerate(headings):
        is_text = index < left
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    return table
