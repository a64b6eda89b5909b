"""Every flag of the tables is Megatron-LM's, is refused in one line, and is not where it says what is so anyway."""

import argparse

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.runtime.refusals import PACKED, PLANNED, PROFILED, _actions, megatron_defaults, refuse

TABLES = {"packed": PACKED, "planned": PLANNED, "profiled": PROFILED}
CASES = [
    pytest.param(flag, reason, table, id=f"{name} {flag}")
    for name, table in TABLES.items() for reason, flags in table.items() for flag in flags
]  # fmt: skip
ENUMERATIONS = {"--cuda-graph-modules": "attn", "--cuda-graph-scope": "attn"}
IMPLIED = ["--micro-batch-size", "1", "--global-batch-size", "8", "--attention-dropout", "0", "--seq-length", "64"]


def words_for(action: argparse.Action) -> list[str]:
    """A value that a flag does not have by default."""
    if action.nargs == 0:
        return []
    if action.option_strings[0] in ENUMERATIONS:
        return [ENUMERATIONS[action.option_strings[0]]]
    if action.choices:
        return [next(str(value) for value in action.choices if value != megatron_defaults()[action.dest])]
    return ["0.37" if action.type is float else "77"] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize("flag, reason, table", CASES)
def test_flag_is_refused_with_its_reason(flag, reason, table):
    argv = ["--num-layers", "2", flag, *words_for(_actions()[flag]), "--bf16"]
    with pytest.raises(ConfigError) as refused:
        refuse(argv, IMPLIED, "--hbp-plan", table)
    assert str(refused.value) == f"{flag} cannot be used with --hbp-plan: {reason}"
    refuse(argv, IMPLIED, "--hbp-plan")  # plain Megatron-LM


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--micro-batch-size 1 --global-batch-size 8",  # what is implied
        "--attention-dropout 0.0",
        "--context-parallel-size 1 --cuda-graph-impl none --num-workers 2",  # the defaults
        "--hbp-plan global-batch-size --lr 1e-3 --use-distributed-optimizer",
    ],
)
def test_what_changes_nothing_is_taken(argv):
    refuse(argv.split(), IMPLIED, "--hbp-plan", PACKED, PLANNED)


def test_the_default_is_refused_where_another_value_is_implied():
    with pytest.raises(ConfigError, match=r"^--attention-dropout cannot"):
        refuse(["--attention-dropout", "0.1"], IMPLIED, "--hbp-plan", PACKED)
    with pytest.raises(ConfigError, match=r"^--global-batch-size cannot .*: the plan sets the batch of each step$"):
        refuse(["--global-batch-size", "64"], IMPLIED, "--hbp-plan", PLANNED)


def test_a_value_that_cannot_be_read_is_a_mistake_in_one_line(capsys):
    with pytest.raises(ConfigError, match=r"--global-batch-size: invalid int value: 'many'; see --help"):
        refuse(["--global-batch-size", "many"], IMPLIED, "--hbp-plan", PLANNED)
    assert capsys.readouterr() == ("", "")


def test_no_flag_is_in_two_tables_of_one_program():
    for other in (PLANNED, PROFILED):
        flags = [flag for table in (PACKED, other) for each in table.values() for flag in each]
        assert len(flags) == len(set(flags))
