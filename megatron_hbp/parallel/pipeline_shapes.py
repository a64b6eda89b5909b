"""Shapes between pipeline stages, from the plan instead of over the wire.

Where the local tokens of micro-batches differ, Megatron-LM's stages send each other the shape before every tensor and
wait for it on the host: a transfer and a synchronization per hop. All stages of a pipeline have the same data-parallel
rank, so each knows what the plan gives it. Under 1F1B the k-th tensor from the previous stage is the activations of
micro-batch k, and the k-th from the next stage the gradient of its output; both are [s_k, 1, h], s_k local tokens
(a TP-th of them under sequence parallelism), h the hidden width.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig

Shape = list[int]


class PlannedP2PCommunicator(P2PCommunicator):
    """Megatron-LM's communicator for one pass of the schedule without interleaving; shapes are known beforehand."""

    def __init__(self, pp_group: dist.ProcessGroup, config: TransformerConfig, local_tokens: Sequence[int]):
        """`local_tokens`: padded tokens of this data-parallel rank in each micro-batch of the pass, in order."""
        super().__init__(pp_group=pp_group, config=config)
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.shapes = [[tokens // parts, 1, config.hidden_size] for tokens in local_tokens]
        self._received_prev, self._received_next, self._sent_prev, self._sent_next = (
            iter(self.shapes) for _ in range(4)
        )

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Shapes to receive from the previous and from the next stage, [0, 0, 0] where nothing comes.

        What is sent is checked, since a receiver cannot: a buffer of another size is filled or overrun in silence.
        """
        for sent, planned in ((tensor_send_prev, self._sent_prev), (tensor_send_next, self._sent_next)):
            if sent is not None:
                shape = next(planned)
                assert list(sent.shape) == shape, f"a stage sends {list(sent.shape)}, the plan says {shape}"
        return _next_if(recv_prev, self._received_prev), _next_if(recv_next, self._received_next)


def _next_if(expected: bool, planned: Iterator[Shape]) -> Shape:
    return next(planned) if expected else [0, 0, 0]
