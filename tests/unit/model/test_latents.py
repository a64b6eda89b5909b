"""Parts of the exchange of MLA's latents that need no ranks: positions, specs, refusals."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

from megatron_hbp.model import spec
from tests.unit.model.test_split import splits_of

PACKS = {
    "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=12),
    "cp_degree": st.sampled_from([2, 3, 4]),
    "zigzag": st.booleans(),
}


@settings(max_examples=100, deadline=None)
@given(**PACKS)
def test_positions_of_shared_tokens_start_at_each_sample(lengths, cp_degree, zigzag):
    shared = splits_of(lengths, cp_degree, zigzag)[0][0].shared
    if shared is not None:
        expected = np.concatenate([np.arange(n) for n in np.diff(shared.segments.q)])
        np.testing.assert_array_equal(shared.positions.numpy(), expected)
        assert shared.positions.dtype == torch.int64


class Fused:
    """Stands for a layer with a norm in it."""


class Plain:
    """Stands for one without."""


class Norm:
    """Stands for a norm."""


BACKEND = SimpleNamespace(
    column_parallel_layer_norm_linear=lambda: Fused,
    column_parallel_linear=lambda: Plain,
    layer_norm=lambda rms_norm, for_qk: Norm,
)


@dataclasses.dataclass
class Layer:
    """Stands for a layer's submodules."""

    attention: MLASelfAttentionSubmodules
    mlp: type


def test_up_projections_get_norms_of_their_own_and_nothing_else_does():
    attention = MLASelfAttentionSubmodules(
        linear_proj=Plain, q_layernorm=IdentityOp, kv_layernorm=IdentityOp, linear_q_proj=Plain,
        linear_q_up_proj=Fused, linear_kv_up_proj=Fused, linear_kv_down_proj=Plain,
    )  # fmt: skip
    made = spec.unfused([Layer(attention, Fused)], BACKEND, rms_norm=True)[0]
    assert made.mlp is Fused
    assert made.attention.linear_q_up_proj is made.attention.linear_kv_up_proj is Plain
    assert made.attention.q_layernorm is made.attention.kv_layernorm is Norm
    assert attention.linear_q_up_proj is Fused, "the given spec stays as it is"
