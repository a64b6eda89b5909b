"""The communicator that knows shapes from the plan. One process; the group is only a name here."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hbp.parallel.pipeline_shapes import PlannedP2PCommunicator

NOTHING = [0, 0, 0]


def communicator(monkeypatch, lengths, **config) -> PlannedP2PCommunicator:
    monkeypatch.setattr("torch.distributed.get_global_rank", lambda group, rank: rank)
    settings = {
        "hidden_size": 8, "tensor_model_parallel_size": 2, "sequence_parallel": False,
        "virtual_pipeline_model_parallel_size": None,
    } | config  # fmt: skip
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    return PlannedP2PCommunicator(group, SimpleNamespace(**settings), lengths)  # type: ignore[arg-type]


def test_each_direction_counts_for_itself(monkeypatch):
    stage = communicator(monkeypatch, [4, 6, 2])
    assert stage._communicate_shapes(None, None, True, False) == ([4, 1, 8], NOTHING)
    assert stage._communicate_shapes(None, None, True, False) == ([6, 1, 8], NOTHING)
    assert stage._communicate_shapes(torch.empty(4, 1, 8), None, False, True) == (NOTHING, [4, 1, 8])
    assert stage._communicate_shapes(None, torch.empty(4, 1, 8), True, True) == ([2, 1, 8], [6, 1, 8])
    assert stage._communicate_shapes(None, None, False, False) == (NOTHING, NOTHING)


def test_sequence_parallel_stages_exchange_a_part(monkeypatch):
    stage = communicator(monkeypatch, [4, 6], sequence_parallel=True)
    assert stage._communicate_shapes(torch.empty(2, 1, 8), None, True, False) == ([2, 1, 8], NOTHING)
    assert stage._communicate_shapes(torch.empty(3, 1, 8), None, False, True) == (NOTHING, [2, 1, 8])


@pytest.mark.parametrize("to_next", [True, False])
def test_what_is_sent_must_be_what_the_plan_says(monkeypatch, to_next):
    stage, wrong = communicator(monkeypatch, [4, 6]), torch.empty(6, 1, 8)
    with pytest.raises(AssertionError, match=r"sends \[6, 1, 8\], the plan says \[4, 1, 8\]"):
        stage._communicate_shapes(wrong if to_next else None, None if to_next else wrong, False, False)
