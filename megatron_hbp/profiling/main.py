"""From a command line to a profile."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_hbp.planning.cost.profile_table import ProfileTable
from megatron_hbp.profiling.options import PROGRAM, ProfileOptions, add_arguments, implied_flags
from megatron_hbp.runtime.program import leave, parse, run_program
from megatron_hbp.runtime.refusals import PACKED, PROFILED


def main() -> None:
    """Profile; a known error ends in one line and its exit code."""
    run_program(run, PROGRAM)


def run(argv: Sequence[str]) -> ProfileTable:
    """Measure, fit and write; see `rows.profile`."""
    options = ProfileOptions.from_argv(argv)
    args = parse_quietly(argv, options)
    from megatron_hbp.profiling.rows import profile

    table = profile(args, options)
    leave()
    return table


def parse_quietly(argv: Sequence[str], options: ProfileOptions) -> Any:
    """Megatron-LM's arguments, without its hundreds of lines about them on the terminal."""
    with quiet():
        return parse(argv, add_arguments, implied_flags(options), f"`{PROGRAM}`", PACKED, PROFILED)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Megatron-LM prints off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
