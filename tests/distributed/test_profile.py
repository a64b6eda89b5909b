"""`hbp profile` on gloo ranks: rows, memory that runs out on one rank, resuming, another model's table."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hbp.planning import profile_table
from megatron_hbp.planning.cost_file import cost_model
from megatron_hbp.planning.types import parse_tiers
from tests.launching import ROOT

MODEL = shlex.split("--num-layers 2 --hidden-size 32 --num-attention-heads 2 --normalization RMSNorm --vocab-size 96")
GRID = ["--hbp-profile-cp=1,2", "--hbp-profile-recompute=none,full2", "--hbp-profile-seconds=0.01"]


def profile(out: Path, lengths: str, *flags: str, breaks: str = "") -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "megatron_hbp.launch", "--standalone", "--nproc-per-node", "2", "-m",
        "tests.distributed.profile_worker", f"--hbp-profile-out={out}", f"--hbp-profile-lengths={lengths}", *GRID,
        *flags, *MODEL,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HBP_EXIT_CODE_FILE"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1", "HBP_TEST_BREAKS": breaks},
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """128 and 256 tokens, out of memory on rank 1 at 256:cp1."""
    out = tmp_path_factory.mktemp("profile") / "p.json"
    return out, profile(out, "128,256", breaks="256:cp1")


def test_memory_that_runs_out_on_one_rank_ends_the_row_not_the_run(first):
    out, ended = first
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = profile_table.load(out).rows
    assert len(rows) == 20
    assert {str(row.setting.tier) for row in rows if not row.fits} == {"256:cp1"}
    reasons = [row.why for row in rows if not row.fits]
    assert reasons[0] == "out of memory" and all("did not fit" in why for why in reasons[1:])
    assert all(row.seconds > 0 and row.peak_bytes > row.saved_bytes > 0 for row in rows if row.fits)
    short = [row for row in rows if (row.tokens, row.cp_degree, row.shape) == (128, 1, "one")]
    saved = {row.recompute: row.saved_bytes for row in short}
    assert saved["full2"] < saved["none"]


def test_the_fitted_cost_model_prices_tiers(first):
    out, _ = first
    cost = cost_model(str(out.with_name("p.cost.json")))
    short, long = (cost.tier_cost(tier) for tier in parse_tiers("128:cp1,256:cp2:full2"))
    assert short.seconds(128, 128**2) > 0 and long.seconds(256, 256**2) > 0


def test_it_goes_on_where_it_stopped_also_when_ranks_were_stuck(first):
    out, _ = first
    before = profile_table.load(out).rows
    ended = profile(out, "128,256,512", "--hbp-profile-patience=2", breaks="512:cp2")
    assert ended.returncode == 75, ended.stderr[-3000:]
    assert "512:cp2:none" in ended.stderr and "run the same command again" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = profile(out, "128,256,512")
    assert ended.returncode == 0, ended.stderr[-3000:]
    after = profile_table.load(out).rows
    assert after[: len(before)] == before
    why = [row.why for row in after if str(row.setting.tier) == "512:cp2" and row.why]
    assert "others were in an exchange" in why[0]


def test_a_table_of_another_model_is_refused(first):
    out, _ = first
    ended = profile(out, "128", "--hbp-profile-supervised=0.5")
    assert ended.returncode == 78
    (line,) = [line for line in ended.stderr.splitlines() if "hbp profile:" in line]
    assert "supervised: 0.67 there, 0.5 here" in line and "--hbp-profile-out" in line
    assert "Traceback" not in ended.stderr
