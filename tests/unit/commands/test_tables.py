"""Tables of the commands in a pipe: 80 columns, also where the terminal behind is narrower, and nothing cut."""

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.lengths import generate
from megatron_hbp.cli import app
from tests.unit.commands.running import done

WORDS = {
    "plan --ranks 8 --tiers 16384:cp1,32768:cp2,131072:cp8 --step-tokens 1048576": "tier packs samples tokens full",
    "plan --ranks 8 --auto --step-tokens 1048576": "tiers epoch bound recompute exchange equal chosen paper",
    "plan compare --ranks 8 --max-samples 300": "planner epoch idle ABR DBR PR CR eta^2 plan",
    "plan show PLAN": "tier packs samples tokens full HBP",
    "simulate PLAN --nodes 1": "cause share seconds per GPU headroom",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    np.save(folder / "lengths.npy", np.append(generate("mix", num_samples=2000), 131072))
    tiers = ["--tiers", "16384:cp1,131072:cp8", "--step-tokens", 1048576]
    done("plan", "--lengths", folder / "lengths.npy", "--ranks", 8, *tiers, "--out", folder / "PLAN")
    return folder


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize("command", WORDS)
def test_lines_and_headings(files, command, columns):
    words = [str(files / "PLAN") if word == "PLAN" else word for word in command.split()]
    if "PLAN" not in command:
        words += ["--lengths", str(files / "lengths.npy")]
    if "--step-tokens" in command:
        words += ["--out", str(files / "OUT"), "--overwrite"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": columns})
    assert result.exit_code == 0, (result.output, result.exception)
    lines = [line for line in result.stdout.splitlines() if not line.startswith("plan written to")]
    assert max(map(len, lines)) <= 80
    assert set(WORDS[command].split()) <= set(result.stdout.split())
    assert "…" not in result.stdout
