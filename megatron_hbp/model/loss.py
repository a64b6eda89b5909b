"""The stable loss ("Ave-Token", paper section 3.4): every supervised token of a step weighs the same.

Each rank returns the *sum* of its tokens' losses and their count; with --calculate-per-token-loss Megatron-LM sums the
counts over all data-parallel ranks and micro-batches and divides the summed gradients once. Every token's loss is
computed on exactly one rank whatever the CP degree, so the same code is exact for any mixture of tiers, and a dummy
micro-batch weighs nothing.

Logits are large: 16K tokens x 128K words in fp32 are 8.4 GB. So they are computed for supervised positions only, which
are first spread evenly over the CP ranks (a document's supervised part lies in its last slices), and in chunks, of
which one at a time stands in memory: all but the last are computed again in the backward. The loss keeps the
dtype of fp64 and fp32 logits; fp16 and bf16 are computed in fp32 (Megatron-LM's own cross-entropy casts fp64 to fp32,
which hides 6e-8 from an exactness test).

Legend: `s` local tokens, `r` supervised ones of them, `q` those whose loss is computed here, `v` words of the
vocabulary on this tensor-parallel rank, `h` hidden width.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.utils.checkpoint import checkpoint

# 1,024 rows x 128K words in fp32 are 0.5 GB; smaller chunks make the vocabulary GEMM less efficient.
CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class LossRows:
    """Which positions of a slice are supervised, and which rank computes whose loss."""

    local: torch.Tensor
    """int64 [r], supervised positions in [0, s)."""
    labels: torch.Tensor
    """int64 [q], what the positions whose loss is computed here should predict."""
    rows_to: tuple[int, ...]
    """How many of the r, in order, go to each CP rank."""
    rows_from: tuple[int, ...]
    """How many of the q come from each CP rank."""
    cp_group: dist.ProcessGroup | None


def supervised_token_losses(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, context: LossRows,
    scale_logits: Any, **unused: Any,
) -> torch.Tensor:  # fmt: skip
    """GPTModel's `output_processor`: the losses [q] that this rank computes.

    Args:
        hidden_states: [s, 1, h], or [s / TP, 1, h] under sequence parallelism.
        output_layer: the model's column-parallel vocabulary projection.
        output_weight: the shared embedding, or None.
        context: the supervised positions.
        scale_logits: the model's logit scaling (MuP).
    """
    if output_layer.sequence_parallel:
        # before rows are chosen; the projection's backward adds up over the tensor-parallel ranks, this one only cuts
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False
        )
    rows = hidden_states.squeeze(1).index_select(0, context.local)  # [r, h]
    if context.cp_group is not None:
        rows = _Spread.apply(rows, context.rows_to, context.rows_from, context.cp_group)  # [q, h]

    def losses_of(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with _on_whole_sequence(output_layer):  # inside, for a chunk comes here once more in the backward
            logits, _ = output_layer(rows[:, None], weight=output_weight)
        return cross_entropy(scale_logits(logits).squeeze(1), labels)

    chunks = list(zip(rows.split(CHUNK_ROWS), context.labels.split(CHUNK_ROWS), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([losses_of(*chunk) for chunk in chunks])
    # the backward begins with the last chunk: its logits are kept, there are no others yet
    losses = [checkpoint(losses_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks[:-1]]
    return torch.cat([*losses, losses_of(*chunks[-1])])


@contextlib.contextmanager
def _on_whole_sequence(output_layer: Any) -> Iterator[None]:
    """Have the projection take rows of the whole sequence, and add up the gradients of its input, for one call."""
    parallel, reduces = output_layer.sequence_parallel, output_layer.allreduce_dgrad
    output_layer.sequence_parallel, output_layer.allreduce_dgrad = False, parallel or reduces
    try:
        yield
    finally:
        output_layer.sequence_parallel, output_layer.allreduce_dgrad = parallel, reduces


class _Spread(torch.autograd.Function):
    """All-to-all of rows: the first rows_to[0] go to rank 0, and so on; backward sends the gradients back."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, rows_to: tuple[int, ...], rows_from: tuple[int, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.way_back = (rows_from, rows_to, group)
        return _exchanged(rows, rows_to, rows_from, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchanged(grad, *ctx.way_back), None, None, None


def _exchanged(
    rows: torch.Tensor, rows_to: tuple[int, ...], rows_from: tuple[int, ...], group: dist.ProcessGroup
) -> torch.Tensor:
    received = rows.new_empty((sum(rows_from), rows.shape[1]))
    dist.all_to_all_single(received, rows.contiguous(), list(rows_from), list(rows_to), group=group)
    return received


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [q] of logits [q, v], whose words may be spread over the tensor-parallel ranks."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(tp_group) == 1:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return _VocabParallelCrossEntropy.apply(logits, labels, tp_group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary cut into equal parts by tensor-parallel rank, in the dtype of the logits."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        highest = logits.amax(dim=1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - highest[:, None]).exp()
        total = exponentials.sum(dim=1)
        local = labels - dist.get_rank(group) * logits.shape[1]
        here = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)[:, None]
        target = logits.gather(1, local).squeeze(1).where(here, 0)
        sums = torch.stack((total, target))
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials / sums[0][:, None], local, here)
        return sums[0].log() + highest - sums[1]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shares, local, here = ctx.saved_tensors
        slope = shares.scatter_add(1, local, -here[:, None].to(shares.dtype))
        return slope * grad[:, None], None, None


def loss_sum(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron-LM's 3-tuple loss: the sum to differentiate, this rank's token count, and [sum, count] to report."""
    total = losses.sum()
    count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)  # torch.tensor copies, and waits
    report = torch.stack((total.detach().float(), count.float()))
    return total, count, {"lm loss": report}
