"""Progress bars appear on terminals only."""

import io

import pytest
from rich.console import Console

from megatron_hbp.report.progress import byte_progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(is_terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=100)
    with byte_progress("verifying", 4_000, console) as advance:
        advance(1_000)
        advance(3_000)
    assert ("verifying" in shown.getvalue() and "4.0/4.0 kB" in shown.getvalue()) is is_terminal
    assert is_terminal or shown.getvalue() == ""
