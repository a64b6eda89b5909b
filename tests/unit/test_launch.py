"""The launcher hands on the exit code that the workers wrote down."""

import os
import sys
from datetime import datetime
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_hbp import launch


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """launch.main() sets HBP_EXIT_CODE_FILE for its children: put it back afterwards."""
    monkeypatch.setenv("HBP_EXIT_CODE_FILE", "")
    monkeypatch.delenv("HBP_EXIT_CODE_FILE")


def failed() -> ChildFailedError:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file="none")
    failure.timestamp = int(datetime(2026, 1, 1).timestamp())
    return ChildFailedError("pretrain_hbp.py", {0: failure})


def torchrun(monkeypatch, *, writes: str | None = None, fails: bool = True) -> list[list[str]]:
    """A torchrun whose workers write a code, or not, and fail, or not."""
    started: list[list[str]] = []

    def main(argv: list[str]) -> None:
        started.append(argv)
        if writes is not None:
            Path(os.environ["HBP_EXIT_CODE_FILE"]).write_text(writes)
        if fails:
            raise failed()

    monkeypatch.setattr(launch.run, "main", main)
    return started


@pytest.mark.parametrize("code", [65, 70, 73, 75, 78])
def test_the_workers_code_is_handed_on(monkeypatch, capsys, code):
    torchrun(monkeypatch, writes=f"{code}\n")
    assert launch.main(["x"]) == code
    assert capsys.readouterr().err == ""  # the worker has said it


def test_a_crash_without_a_code_is_internal(monkeypatch, capsys):
    torchrun(monkeypatch)
    assert launch.main(["x"]) == 70
    assert "pretrain_hbp.py FAILED" in capsys.readouterr().err


def test_success_is_zero(monkeypatch):
    started = torchrun(monkeypatch, fails=False)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--nproc-per-node", "2", "pretrain_hbp.py", "--lr", "1"])
    assert launch.main() == 0
    assert started == [["--nproc-per-node", "2", "pretrain_hbp.py", "--lr", "1"]]


def test_a_code_left_by_another_run_is_not_believed(monkeypatch, tmp_path):
    file = tmp_path / "code"
    file.write_text("75\n")
    monkeypatch.setenv("HBP_EXIT_CODE_FILE", str(file))
    torchrun(monkeypatch)
    assert launch.main(["x"]) == 70


def test_a_given_file_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HBP_EXIT_CODE_FILE", str(tmp_path / "code"))
    torchrun(monkeypatch, writes="75\n")
    assert launch.main(["x"]) == 75
    assert (tmp_path / "code").read_text() == "75\n"
