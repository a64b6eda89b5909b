"""`hbp profile` on gloo ranks: rows, memory that runs out on one rank, resuming, another model's table."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.file import cost_model
from megatron_hbp.planning.cost.profile_table import Measurement, ProfileTable
from tests.launching import ROOT

pytestmark = pytest.mark.slow  # four starts, 60 s of the twelve minutes that make test may take

MODEL = shlex.split("--num-layers 2 --hidden-size 32 --num-attention-heads 2 --normalization RMSNorm --vocab-size 96")
GRID = shlex.split(
    "--hbp-profile-lengths=128,256 --hbp-profile-cp=1,2 --hbp-profile-recompute=none,full2 --hbp-profile-seconds=0.01"
)


def profile(out: Path, *flags: str, breaks: str = "") -> subprocess.CompletedProcess:
    """On two ranks; memory runs out on rank 1 in the tier `breaks`."""
    command = [
        sys.executable, "-m", "megatron_hbp.launch", "--standalone", "--nproc-per-node", "2", "-m",
        "tests.distributed.profile_worker", f"--hbp-profile-out={out}", *GRID, *flags, *MODEL,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HBP_EXIT_CODE_FILE"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500,
        env={**environment, "OMP_NUM_THREADS": "1", "HBP_TEST_BREAKS": breaks},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Three starts with one table, one after the other, and one more."""

    stuck: subprocess.CompletedProcess
    """Memory runs out on rank 1 at 256:cp2, rank 0 waits for it in an exchange."""
    rows: tuple[Measurement, ...]
    """What was in the table then."""
    resumed: subprocess.CompletedProcess
    """Memory runs out on rank 1 at 256:cp1, where no rank waits for another."""
    table: ProfileTable
    cost_file: Path
    other: subprocess.CompletedProcess
    """Another share of supervised tokens, the same table."""
    first: subprocess.CompletedProcess
    """Memory runs out on rank 1 in the very first row, of a table of its own."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("profile") / "p.json"
    stuck = profile(out, "--hbp-profile-patience=2", breaks="256:cp2")
    rows = profile_table.load(out).rows
    resumed = profile(out, breaks="256:cp1")
    return Runs(
        stuck=stuck, rows=rows, resumed=resumed, table=profile_table.load(out),
        cost_file=out.with_name("p.cost.json"), other=profile(out, "--hbp-profile-supervised=0.5"),
        first=profile(out.with_name("first.json"), "--hbp-profile-patience=2", breaks="128:cp2:full2"),
    )  # fmt: skip


@pytest.mark.parametrize("which, tier", [("stuck", "256:cp2:none"), ("first", "128:cp2:full2")])
def test_ranks_that_wait_for_one_out_of_memory_end_with_it_and_say_what_to_do(runs, which, tier):
    run = getattr(runs, which)  # the first row is where everything warms up
    assert run.returncode == 75, run.stderr[-3000:]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("hbp profile: [rank")]
    assert tier in line and "run the same command again" in line
    assert "Traceback" not in run.stderr


def test_the_next_start_goes_on_from_there_and_measures_nothing_twice(runs):
    assert runs.resumed.returncode == 0, runs.resumed.stderr[-3000:]
    assert 0 < len(runs.rows) < len(runs.table.rows) == 16
    assert runs.table.rows[: len(runs.rows)] == runs.rows


def test_memory_that_runs_out_on_one_rank_ends_the_row_not_the_run(runs):
    refused = [row for row in runs.table.rows if not row.fits]
    assert {str(row.setting.tier) for row in refused} == {"256:cp2", "256:cp1"}
    why = {degree: [row.why for row in refused if row.cp_degree == degree] for degree in (1, 2)}
    assert "others were in an exchange" in why[2][0] and why[1][0] == "out of memory"
    assert all("did not fit" in reason for reason in why[1][1:] + why[2][1:])


def test_rows_hold_seconds_and_bytes_and_make_a_cost_model(runs):
    rows = [row for row in runs.table.rows if row.fits]
    assert all(row.seconds > 0 and row.repeats >= 3 for row in rows)
    weighed = [row for row in rows if row.peak_bytes is not None]
    assert weighed == [row for row in rows if row.shape == "one"]
    assert all(row.peak_bytes > row.saved_bytes > 0 for row in weighed)
    assert runs.table.yardstick > 0
    short = [row for row in rows if (row.tokens, row.cp_degree, row.shape) == (128, 1, "one")]
    saved = {row.recompute: row.saved_bytes for row in short}
    assert saved["full2"] < saved["none"]
    cost = cost_model(str(runs.cost_file))
    assert all(cost.tier_cost(tier).seconds(128, 128**2) > 0 for tier in parse_tiers("128:cp1,256:cp2:full2"))


def test_a_table_measured_otherwise_is_refused(runs):
    assert runs.other.returncode == 78
    (line,) = [line for line in runs.other.stderr.splitlines() if "hbp profile:" in line]
    assert "supervised: 0.67 there, 0.5 here" in line and "--hbp-profile-out" in line
    assert "Traceback" not in runs.other.stderr
