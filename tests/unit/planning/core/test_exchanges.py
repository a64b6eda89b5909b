"""What exchanges move, against the figures of the design notes, and where one cannot be used."""

import pytest

from megatron_hbp.planning.core.exchanges import EXCHANGES, planned, usable
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2

LLAMA_8B = AttentionShape(num_query_heads=32, num_kv_heads=8, qk_width=128, v_width=128)
LLAMA_70B_TP8 = AttentionShape(num_query_heads=64, num_kv_heads=8, qk_width=128, v_width=128).on_tensor_parallel_rank(8)
NINE_HEADS = AttentionShape(num_query_heads=9, num_kv_heads=3, qk_width=64, v_width=64)
MLA = DEEPSEEK_V2.attention


def elements(name, shape, c):
    return EXCHANGES[name].elements(shape, c)


@pytest.mark.parametrize("c", [2, 4, 8])
def test_elements_per_token(c):
    assert elements("a2a", LLAMA_8B, c) == 10_240 * (c - 1) / c
    assert elements("all_gather", LLAMA_8B, c) == elements("p2p", LLAMA_8B, c) == 2_048 * (c - 1)
    assert elements("p2p", LLAMA_70B_TP8, c) == 256 * (c - 1)
    assert elements("a2a", MLA, c) == 81_920 * (c - 1) / c
    assert elements("qkv_latent", MLA, c) == 2_112 * (c - 1) + 16_384 * (c - 1) / c
    assert elements("kv_latent", MLA, c) == 576 * (c - 1)


def test_latents_of_deepseek_v2_against_heads():
    shares = [elements("qkv_latent", MLA, c) / elements("a2a", MLA, c) for c in (2, 4, 8)]
    assert all(found <= most for found, most in zip(shares, (0.26, 0.31, 0.41), strict=True))
    parts = [elements("a2a", MLA, c) / elements("kv_latent", MLA, c) for c in (2, 4, 8)]
    assert all(found >= least for found, least in zip(parts, (70, 35, 17), strict=True))


def test_keys_up_projected_again_are_5_14_and_34_percent_of_the_forward():
    forward = 2 * 21e9 / 60  # FLOPs per token and layer
    shares = [EXCHANGES["kv_latent"].extra_flops(MLA, c) / forward for c in (2, 4, 8)]
    assert shares == pytest.approx([0.05, 0.14, 0.34], abs=0.01)
    assert all(each.extra_flops(MLA, 8) == 0 for name, each in EXCHANGES.items() if name != "kv_latent")


def test_kv_heads_fewer_than_the_degree_are_replicated():
    assert elements("a2a", LLAMA_70B_TP8, 8) == (8 + 8) * 256 * 7 / 8


def test_rings_pass_keys_once_more_and_their_gradients_in_fp32():
    rings = {name for name, each in EXCHANGES.items() if each.is_ring}
    assert rings == {"p2p", "kv_latent"}
    assert {name: each.backward_bytes for name, each in EXCHANGES.items()} == {
        name: 3 if name in rings else 1 for name in EXCHANGES
    }


def test_what_cannot_be_used_says_why():
    assert "does not divide the 8 query heads" in str(EXCHANGES["a2a"].refusal(LLAMA_70B_TP8, 16))
    assert "no latent attention" in str(EXCHANGES["kv_latent"].refusal(LLAMA_8B, 2))
    assert EXCHANGES["p2p"].refusal(LLAMA_70B_TP8, 16) is None


def test_some_exchange_can_always_be_used_and_auto_plans_with_one_that_can():
    for c in (2, 3, 4, 8, 16):
        assert {"all_gather", "p2p"} <= {each.name for each in usable(NINE_HEADS, c)}
        assert planned("auto", NINE_HEADS, c).name == ("a2a" if c == 3 else "all_gather")
    assert planned("p2p", NINE_HEADS, 3).name == "p2p"
    assert [each.name for each in usable(MLA, 8)] == list(EXCHANGES)
