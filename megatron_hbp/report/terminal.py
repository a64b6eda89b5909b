"""Where tables go."""

from rich.console import Console

PLAIN_WIDTH = 160
"""Columns where the output is no terminal: rich would take 80, and cut the tables."""


def wide_console() -> Console:
    """A console as wide as its terminal, or wide enough for our tables in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)
