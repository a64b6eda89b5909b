"""Every mistake on the command line ends in one line and an exit code."""

import sys

import pytest

from megatron_hbp import cli


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["plan", "--ranks", "eight"], "'--ranks'"),
        (["plan", "--foo"], "No such option"),
        (["plan", "--seed", "-1"], "--seed"),
        (["plan", "compare", "--max-samples", "0"], "--max-samples"),
        (["simulate", "PLAN"], "--nodes"),
        (["store", "verify"], "STORE"),
        (["frobnicate"], "No such command"),
        (["profile", "--nproc-per-node", "0"], "a number of ranks"),
        (["plan", "show", "no.plan"], "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line_and_78(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["hbp", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 78
    assert message.startswith("hbp: ") and says in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, code", [([], 78), (["plan"], 78), (["store"], 78), (["--help"], 0), (["plan", "--help"], 0)]
)
def test_help_is_help_and_nothing_else(monkeypatch, capsys, arguments, code):
    monkeypatch.setattr(sys, "argv", ["hbp", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
    printed = capsys.readouterr()
    assert "Usage" in printed.out and printed.err == ""
