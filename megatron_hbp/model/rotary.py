"""Rotary embedding by the positions of this rank's slice of a pack.

Megatron-LM rotates token i of a forward pass by frequency i, or slices by its static CP group. A slice of a pack needs
the frequency of each token's position inside its own sample.
"""

from typing import Any

import torch
from torch import nn

from megatron_hbp.model import context as micro_batch


class PackedRotary(nn.Module):
    """Wraps a RotaryEmbedding or YarnRotaryEmbedding; answers with the rows of the current local positions."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """The table length that Megatron-LM asks for before it calls; ours follows from the micro-batch."""
        return micro_batch.current().max_seqlen

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Any:
        """Frequencies [s, 1, 1, d] of the local positions (YaRN: and its mscale)."""
        return self.at(micro_batch.current().position_ids)

    def at(self, position_ids: torch.Tensor) -> Any:
        """The same for any positions [n] inside the samples of the current pack: [n, 1, 1, d]."""
        context = micro_batch.current()
        # The wrapped module caches its tables by length (lru_cache): powers of two keep that to a handful of tables.
        length = 1 << (context.max_seqlen - 1).bit_length()
        table = self.rotary(length)
        if isinstance(table, tuple):
            return table[0].index_select(0, position_ids), *table[1:]
        return table.index_select(0, position_ids)


def localise(model: torch.nn.Module) -> int:
    """Wrap every rotary embedding in `model`; returns how many (1 for a GPT model, 1 a layer for MLA)."""
    found = [(holder, getattr(holder, "rotary_pos_emb", None)) for holder in model.modules()]
    rotaries = [(holder, rotary) for holder, rotary in found if isinstance(rotary, nn.Module)]
    for holder, rotary in rotaries:
        holder.rotary_pos_emb = PackedRotary(rotary)
    return len(rotaries)
