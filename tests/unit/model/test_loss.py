"""The stable loss: supervised positions only, in chunks, the dtype kept, half precision in fp32, sums and counts."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_hbp.model import loss

S, HIDDEN, VOCABULARY = 9, 5, 11
ROWS = torch.tensor([0, 2, 3, 6, 8])


@pytest.fixture(autouse=True)
def one_tensor_parallel_rank(monkeypatch):
    monkeypatch.setattr(loss.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(loss.dist, "get_world_size", lambda group: 1)


class Projection(torch.nn.Module):
    """A vocabulary projection that notes how many rows it was asked for."""

    sequence_parallel = allreduce_dgrad = False

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight
        self.asked: list[int] = []

    def forward(self, hidden, weight=None):
        self.asked.append(hidden.shape[0])
        return hidden @ (self.weight if weight is None else weight).T, None


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SimpleNamespace(
        hidden=torch.randn(S, 1, HIDDEN, dtype=torch.float64, requires_grad=True),
        weight=torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True),
        labels=torch.randint(0, VOCABULARY, (len(ROWS),)),
    )


def losses_of(model, projection=None, *, dtype=torch.float64, rows=ROWS, shared=None, scale=lambda logits: logits):
    count = (len(rows),)
    return loss.supervised_token_losses(
        hidden_states=model.hidden.to(dtype), scale_logits=scale, output_weight=shared,
        output_layer=projection or Projection(model.weight.to(dtype)),
        context=loss.LossRows(
            local=rows, labels=model.labels[: len(rows)], rows_to=count, rows_from=count, cp_group=None
        ),
        labels=None, loss_mask=None, config=None,
    )  # fmt: skip


def expected(model, dtype=torch.float64):
    logits = model.hidden.to(dtype)[ROWS, 0] @ model.weight.to(dtype).T
    return -logits.double().log_softmax(1)[range(len(ROWS)), model.labels]


def test_losses_of_supervised_positions_in_fp64(model):
    projection = Projection(model.weight)
    losses = losses_of(model, projection)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected(model), rtol=0, atol=1e-14)
    assert projection.asked == [len(ROWS)]  # no logits of the other positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(model, dtype):
    losses = losses_of(model, dtype=dtype)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected(model, dtype), rtol=0, atol=1e-6)


def test_fp32_stays(model):
    assert losses_of(model, dtype=torch.float32).dtype == torch.float32


def test_shared_embedding_and_logit_scale_are_used(model):
    shared = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    losses = losses_of(model, shared=shared, scale=lambda logits: logits * 0.5)
    logits = 0.5 * model.hidden[ROWS, 0] @ shared.T
    torch.testing.assert_close(losses, F.cross_entropy(logits, model.labels, reduction="none"))


def test_chunks_change_nothing_and_keep_one_chunk_of_logits(model, monkeypatch):
    whole = losses_of(model)
    gradients = torch.autograd.grad(whole.sum(), (model.hidden, model.weight))
    monkeypatch.setattr(loss, "CHUNK_ROWS", 2)
    projection, kept = Projection(model.weight), []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked = losses_of(model, projection)
    assert projection.asked == [2, 2, 1]
    logits = {shape for shape in kept if shape[-1:] == (VOCABULARY,)}
    assert {math.prod(shape[:-1]) for shape in logits - {tuple(model.weight.T.shape)}} <= {1}  # of the last chunk alone
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(chunked.sum(), (model.hidden, model.weight)), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    assert sorted(projection.asked) == [1, 2, 2, 2, 2]  # the others are made again in the backward

    with torch.no_grad():
        assert torch.equal(losses_of(model), chunked.detach())


def test_no_supervised_token_is_a_zero_that_can_be_differentiated(model):
    losses = losses_of(model, rows=torch.zeros(0, dtype=torch.int64))
    total, count, report = loss.loss_sum(losses)
    assert losses.shape == (0,) and total == 0 and count == 0 and report["lm loss"].tolist() == [0, 0]
    total.backward()
    assert model.hidden.grad.abs().sum() == 0 and model.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_sum(dtype):
    losses = torch.tensor([0.1, 0.2, 0.7], dtype=dtype, requires_grad=True)
    total, count, report = loss.loss_sum(losses)
    assert total.dtype == dtype and total == losses.sum()
    assert count.dtype == torch.int and count == 3 and not report["lm loss"].requires_grad
    torch.testing.assert_close(report["lm loss"], torch.tensor([1.0, 3.0]))
    total.backward()
    assert losses.grad is not None and losses.grad.tolist() == [1, 1, 1]  # a sum: nothing is divided here
