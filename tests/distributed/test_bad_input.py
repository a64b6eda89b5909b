"""What a user sees who starts a run with the wrong files: one line, its exit code, no traceback of anything."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import write_plan, write_store

MODEL = shlex.split("--num-layers 1 --hidden-size 16 --num-attention-heads 2 --normalization RMSNorm --lr 1e-3")


@dataclass(frozen=True, kw_only=True)
class Files:
    """A store with plans that fit it and plans that don't."""

    store: Path
    plan: Path
    plan_of_other_data: Path
    plan_for_four: Path
    plan_of_other_model: Path
    absent: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    store = write_store(folder / "store", num_samples=20, seed=1)
    other = write_store(folder / "other", num_samples=20, seed=2)
    for name, data, ranks in (("plan", store, 2), ("of_other_data", other, 2), ("for_four", store, 4)):
        write_plan(folder / name, data, num_ranks=ranks, tiers="128:cp1,256:cp2")
    write_plan(folder / "of_other_model", store, num_ranks=2, tiers="128:cp1:sel=shared_experts,256:cp2")
    return Files(
        store=folder / "store", plan=folder / "plan", plan_of_other_data=folder / "of_other_data",
        plan_for_four=folder / "for_four", plan_of_other_model=folder / "of_other_model", absent=folder / "absent",
    )  # fmt: skip


@pytest.mark.parametrize(
    "plan, store, code, says",
    [
        ("absent", "store", 78, ["{absent}", "cannot be read"]),
        ("plan", "absent", 65, ["{absent}", "no such token store", "hbp prepare"]),
        ("plan_of_other_data", "store", 78, ["belongs to other data"]),
        ("plan_for_four", "store", 78, ["for 4 data-parallel ranks", "this run has 2", "hbp plan --ranks 2"]),
        ("plan_of_other_model", "store", 78, ["tier 128:cp1:sel=shared_experts recomputes", "it has core_attn, layer"]),
    ],
    ids=["no plan", "no store", "plan of other data", "plan for other ranks", "plan of another model"],
)
def test_one_clear_line_and_its_code(files, train, plan, store, code, says):
    ended = train("--hbp-plan", getattr(files, plan), "--hbp-store", getattr(files, store), *MODEL, ranks=2)

    assert ended.code == code, ended.err[-3000:]
    assert len(ended.messages()) == 1, ended.err[-3000:]
    for part in says:
        assert part.format(absent=files.absent) in ended.messages()[0]
    assert "Traceback" not in ended.out + ended.err


def test_training_that_diverges_ends_with_its_code(files, train):
    """Parameters of 1e30 after the first step; without --save, which Megatron-LM's own way out has to have."""
    plan = ("--hbp-plan", files.plan, "--hbp-store", files.store)
    ended = train(*plan, *MODEL, "--lr", "1e30", "--clip-grad", 0, ranks=2)

    assert ended.code == 70, ended.err[-3000:]
    assert len(ended.messages()) == 1 and "training diverged in iteration 2" in ended.messages()[0]
    assert "Traceback" not in ended.out + ended.err
