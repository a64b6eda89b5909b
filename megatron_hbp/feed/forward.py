"""`forward_step` for Megatron-LM's schedules: bind the micro-batch, run the model, hand back the stable loss."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_hbp.feed.feed import MicroBatch
from megatron_hbp.model import context as micro_batch_context
from megatron_hbp.model.loss import loss_sum, supervised_token_losses

Observer = Callable[[MicroBatch], None]


def make_forward_step(observe: Observer | None = None) -> Callable[[Iterator[MicroBatch], GPTModel], tuple[Any, Any]]:
    """Build the forward_step; `observe` is called with each micro-batch before its forward (metrics)."""

    def forward_step(data_iterator: Iterator[MicroBatch], model: GPTModel) -> tuple[torch.Tensor, Any]:
        micro_batch = next(data_iterator)
        if observe is not None:
            observe(micro_batch)
        with micro_batch_context.bind(micro_batch.context):
            output = model(
                micro_batch.tokens,
                micro_batch.context.position_ids[None],
                None,
                output_processor=supervised_token_losses,
                output_processor_context=micro_batch.loss_rows,
            )
        return output, loss_sum

    return forward_step
