"""`--help` at 80 columns: nothing is cut."""

import pytest
import typer.main
from typer.testing import CliRunner

from megatron_hbp.cli import app


def commands(command, path=()):
    """(words, command) of every sub-command, groups included."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_all_are_found():
    assert {("prepare",), ("plan",), ("plan", "compare"), ("profile",), ("simulate",)} < set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_flag_and_every_word_is_whole_at_80_columns(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    words = set(shown.output.replace(",", " ").split())
    for parameter in COMMANDS[path].params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "option":
            assert set(names) <= words, names
    assert "…" not in shown.output
