"""Where tables go."""

from rich.console import Console

PLAIN_WIDTH = 160
"""Columns where the output is no terminal: rich would take 80, and cut the tables."""
LEAST_WIDTH = 120
"""Columns that our tables need: a narrower terminal breaks their lines, but shows every digit."""


def wide_console() -> Console:
    """A console as wide as its terminal, or wide enough for our tables in a file or a pipe."""
    console = Console()
    return Console(width=max(console.width, LEAST_WIDTH) if console.is_terminal else PLAIN_WIDTH)
