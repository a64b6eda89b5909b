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


def plain_table(
    title: str, headings: Sequence[str], *, left: int = 1, text_width: int | None = None, caption: str = ""
) -> Table:
    """An empty table without vertical lines; the first `left` columns are text, the others numbers.

    The last of the text columns is at least `text_width` wide.
    """
    table = Table(
        title=title, title_justify="left", caption=caption or None, caption_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    for index, heading in enumerate(headings):
        width = text_width if index == left - 1 else None
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold", min_width=width)
    return table
