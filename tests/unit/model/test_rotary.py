"""Rotary rows by local position: the rows of the unwrapped table, whatever the pack."""

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_hbp.model.context import bind
from megatron_hbp.model.rotary import PackedRotary, localise
from tests.unit.model.packs import context_of

LENGTHS = [5, 1, 12, 3]
POSITIONS = [i for n in LENGTHS for i in range(n)]


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Megatron-LM moves its table to torch.cuda.current_device() at the first call."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def rope() -> RotaryEmbedding:
    return RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True)


def yarn() -> YarnRotaryEmbedding:
    return YarnRotaryEmbedding(
        kv_channels=8, scaling_factor=4.0, original_max_position_embeddings=16, use_cpu_initialization=True
    )


def test_rope_rows():
    table = rope()(64)
    with bind(context_of(LENGTHS)):
        rows = PackedRotary(rope())(999)  # what Megatron-LM asks for does not matter
    assert rows.shape == (sum(LENGTHS), 1, 1, 8)
    assert torch.equal(rows, table[POSITIONS])


def test_yarn_rows_and_scale():
    table, scale = yarn()(64)
    with bind(context_of(LENGTHS)):
        rows, mine = PackedRotary(yarn())(1, packed_seq=True)
    assert torch.equal(rows, table[POSITIONS]) and mine == scale


def test_length_that_megatron_asks_for_is_the_longest_sample():
    with bind(context_of(LENGTHS)):
        assert PackedRotary(rope()).get_rotary_seq_len(None, object(), packed_seq_params=None) == 12


@pytest.mark.parametrize("longest", [1, 2, 3, 64, 65])
def test_the_table_covers_the_longest_sample(longest):
    with bind(context_of([longest])):
        assert torch.equal(PackedRotary(rope())(1), rope()(longest))


def test_few_tables_are_made():
    """Megatron-LM caches a table for each length asked: powers of two keep that to a handful."""
    rotary, asked = PackedRotary(rope()), []
    plain = rotary.rotary.forward

    def forward(length):
        asked.append(length)
        return plain(length)

    rotary.rotary.forward = forward
    for longest in range(1, 65):
        with bind(context_of([longest])):
            rotary(1)
    assert set(asked) == {1, 2, 4, 8, 16, 32, 64}


def test_localise_wraps_every_holder_once():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary_pos_emb = rope()

    class Without(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary_pos_emb = None

    holders: tuple[Any, Any] = (Attention(), Attention())
    model = torch.nn.Sequential(holders[0], Without(), torch.nn.Sequential(holders[1]))
    assert localise(model) == 2
    assert all(isinstance(holder.rotary_pos_emb, PackedRotary) for holder in holders)
    assert all(isinstance(holder.rotary_pos_emb.rotary, RotaryEmbedding) for holder in holders)
    assert localise(model[1]) == 0
