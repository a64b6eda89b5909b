"""Every mistake on the command line ends in one line and an exit code."""

import sys

import numpy as np
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
    "command, says",
    [
        (f"plan --tiers 64:cp1 --ranks {10**18}", f"ranks must be between 1 and 131072, got {10**18}"),
        ("plan --tiers 64:cp1 --ranks 100000000", "ranks must be between 1 and 131072, got 100000000"),
        ("plan --tiers 64:cp1 --ranks 0", "ranks must be between 1 and 131072, got 0"),
        (f"plan --auto --ranks {10**18}", "ranks must be between 1 and 131072"),
        (f"plan --tiers 64:cp1 --ranks 8 --epochs {10**18}", "--epochs"),
        (f"plan --tiers 64:cp1 --ranks 8 --step-tokens {10**18}", "step tokens must be between 1 and"),
        (f"plan --tiers 64:cp1 --ranks 8 --tp {10**18}", "8 GPUs of a node do not divide"),
        (f"plan --tiers 64:cp1 --ranks 8 --slot-multiple {10**9}", "--slot-multiple"),
        (f"plan --tiers 64:cp1 --ranks 8 --pp {10**8}", "are more than 1024 chunks"),
        (f"plan --tiers 64:cp1 --ranks 8 --pp 4 --virtual-stages {10**9}", "are more than 1024 chunks"),
        (f"plan compare --tiers 64:cp1 --ranks {10**18}", "ranks must be between 1 and 131072"),
        (f"plan compare --tiers 64:cp1 --step-tokens {10**18}", "step tokens must be between 1 and"),
    ],
)
def test_numbers_beyond_all_clusters_end_at_once(monkeypatch, capsys, tmp_path, command, says):
    """They ran out of memory, or counted for hours."""
    np.save(tmp_path / "lengths.npy", np.array([10, 20]))
    flags = ["--lengths", str(tmp_path / "lengths.npy")]
    if "compare" not in command:
        flags += ["--out", str(tmp_path / "PLAN")] + ["--step-tokens", "99"] * ("--step-tokens" not in command)
    monkeypatch.setattr(sys, "argv", ["hbp", *command.split(), *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 78
    assert message.startswith("hbp: ") and says in message and message.count("\n") == 1
    assert not (tmp_path / "PLAN").exists()


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
