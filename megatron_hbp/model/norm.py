"""RMSNorm in plain torch that allows sequence parallelism.

The wrapper that Megatron-LM's local layers use (`WrappedTorchNorm`) refuses sequence parallelism, which MoE with TP > 1
insists on. This one marks its weight, so that Megatron-LM sums its gradient over the tensor-parallel group.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron-LM's constructor and a weight marked `sequence_parallel`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
