"""`hbp profile`: the flags it hands on, and that it starts again after a row that ran out of memory, not otherwise."""

import pytest
from typer.testing import CliRunner

from megatron_hbp import launch
from megatron_hbp.cli import app
from megatron_hbp.commands.profile import MOST_STARTS


@pytest.fixture
def starts(monkeypatch):
    """Command lines that were launched; the test says with which codes they end."""
    lines: list[list[str]] = []
    codes: list[int] = []

    def main(command):
        lines.append(command)
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(launch, "main", main)
    return lines, codes


def profile(*flags):
    return CliRunner().invoke(app, ["profile", "--nproc-per-node", "4", *flags, "--", "--num-layers", "2"])


def test_flags_are_handed_on(starts):
    lines, _ = starts
    assert profile("--lengths", "1024,2048", "--out", "t.json").exit_code == 0
    (line,) = lines
    assert line[:2] == ["--standalone", "--nproc-per-node=4"]
    assert {"--hbp-profile-lengths=1024,2048", "--hbp-profile-out=t.json"} < set(line)
    assert line[-2:] == ["--num-layers", "2"]


def test_it_starts_again_until_no_row_is_lost(starts):
    lines, codes = starts
    codes += [75, 75, 0]
    done = profile()
    assert done.exit_code == 0 and len(lines) == 3 and lines[0] == lines[2]
    assert done.output.count("starting the ranks again") == 2


@pytest.mark.parametrize("code", [70, 78])
def test_other_ends_are_ends(starts, code):
    lines, codes = starts
    codes.append(code)
    assert profile().exit_code == code and len(lines) == 1


def test_it_gives_up(starts):
    lines, codes = starts
    codes += [75] * (MOST_STARTS + 5)
    assert profile().exit_code == 75 and len(lines) == MOST_STARTS
