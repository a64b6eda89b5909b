"""`hbp` as a user calls it."""

from typing import Any

import numpy as np
from typer.testing import CliRunner

from megatron_hbp.cli import app
from megatron_hbp.errors import HbpError

RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(20, 400, 300), RNG.integers(1000, 8192, 20)])


def hbp(*arguments: Any) -> Any:
    """The result of a command, with `exit_code`, `output`, `stdout`, `stderr` and `exception`; 80 columns."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def done(*arguments: Any) -> str:
    """What a command that must succeed prints, lines joined to one."""
    result = hbp(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def refused(*arguments: Any) -> HbpError:
    """The error, one line, that a command must end with."""
    result = hbp(*arguments)
    assert isinstance(result.exception, HbpError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return result.exception
