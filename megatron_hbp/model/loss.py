"""The stable loss ("Ave-Token", paper section 3.4): every supervised token of a step weighs the same.

Each rank returns the *sum* of its tokens' losses and their count; with --calculate-per-token-loss Megatron-LM sums the
counts over all data-parallel ranks and micro-batches and divides the summed gradients once. Every token lives on
exactly one rank whatever the CP degree, so the same code is exact for any mixture of tiers, and a dummy micro-batch
weighs nothing.

Logits are computed for supervised tokens only. The loss keeps the dtype of fp64 and fp32 logits; fp16 and bf16 are
computed in fp32 (Megatron-LM's own cross-entropy casts fp64 to fp32, which hides 6e-8 from an exactness test).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel


def supervised_token_losses(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, labels: torch.Tensor,
    context: torch.Tensor, scale_logits: Any, **unused: Any,
) -> torch.Tensor:  # fmt: skip
    """GPTModel's `output_processor`: losses [n] of the n supervised tokens of this rank.

    Args:
        hidden_states: [s, 1, hidden], or [s / TP, 1, hidden] under sequence parallelism.
        output_layer: the model's column-parallel vocabulary projection.
        output_weight: the shared embedding, or None.
        labels: int64 [1, s], the token that each position predicts.
        context: int64 [n], the supervised positions in [0, s).
        scale_logits: the model's logit scaling (MuP).
    """
    rows = context
    if output_layer.sequence_parallel:  # its input is one rank's share of the sequence: select after the projection
        logits, _ = output_layer(hidden_states, weight=output_weight)
        logits = logits.index_select(0, rows)
    else:
        logits, _ = output_layer(hidden_states.index_select(0, rows), weight=output_weight)
    logits = scale_logits(logits).squeeze(1)  # [n, vocabulary / TP]
    targets = labels.reshape(-1).index_select(0, rows)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], targets[:, None]).reshape(-1)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def loss_sum(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron-LM's 3-tuple loss: the sum to differentiate, this rank's token count, and [sum, count] to report."""
    total = losses.sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    report = torch.stack((total.detach().float(), count.float()))
    return total, count, {"lm loss": report}
