"""What exchanges move, against the figures of the design notes; which one is chosen, and why not another."""

import pytest

from megatron_hbp.planning.core.exchanges import (
    EXCHANGES,
    AttentionShape,
    Machine,
    choose,
    elements,
    extra_flops,
    outside_share,
    price,
    refusal,
)
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import DEEPSEEK_V2, PRESETS

LLAMA_8B = AttentionShape(num_query_heads=32, num_kv_heads=8, qk_width=128, v_width=128)
LLAMA_70B_TP8 = AttentionShape(num_query_heads=64, num_kv_heads=8, qk_width=128, v_width=128).on_tensor_parallel_rank(8)


@pytest.mark.parametrize("c", [2, 4, 8])
def test_elements_a_token(c):
    assert elements("a2a", LLAMA_8B, c) == 10_240 * (c - 1) / c
    assert elements("all_gather", LLAMA_8B, c) == elements("p2p", LLAMA_8B, c) == 2_048 * (c - 1)
    assert elements("p2p", LLAMA_70B_TP8, c) == 256 * (c - 1)
    assert elements("a2a", DEEPSEEK_V2, c) == 81_920 * (c - 1) / c
    assert elements("qkv_latent", DEEPSEEK_V2, c) == 2_112 * (c - 1) + 16_384 * (c - 1) / c
    assert elements("kv_latent", DEEPSEEK_V2, c) == 576 * (c - 1)


def test_latents_of_deepseek_v2_against_heads():
    shares = [elements("qkv_latent", DEEPSEEK_V2, c) / elements("a2a", DEEPSEEK_V2, c) for c in (2, 4, 8)]
    assert all(found <= most for found, most in zip(shares, (0.26, 0.31, 0.41), strict=True))
    parts = [elements("a2a", DEEPSEEK_V2, c) / elements("kv_latent", DEEPSEEK_V2, c) for c in (2, 4, 8)]
    assert all(found >= least for found, least in zip(parts, (70, 35, 17), strict=True))


def test_keys_up_projected_again_are_5_14_and_34_percent_of_the_forward():
    forward = 2 * 21e9 / 60  # FLOPs a token and layer
    shares = [extra_flops("kv_latent", DEEPSEEK_V2, c) / forward for c in (2, 4, 8)]
    assert shares == pytest.approx([0.05, 0.14, 0.34], abs=0.01)


def test_kv_heads_fewer_than_the_degree_are_replicated():
    assert elements("a2a", LLAMA_70B_TP8, 8) == (8 + 8) * 256 * 7 / 8


@pytest.mark.parametrize("degree, node, share", [(8, 8, 0.0), (16, 8, 8 / 15), (4, 1, 1.0), (6, 4, 4 / 5)])
def test_share_from_other_nodes(degree, node, share):
    assert outside_share(degree, node) == pytest.approx(share)


def test_what_cannot_be_used_says_why():
    assert "does not divide the 8 query heads" in refusal("a2a", LLAMA_70B_TP8, 16)
    assert "no latent attention" in refusal("kv_latent", LLAMA_8B, 2)
    assert refusal("p2p", LLAMA_70B_TP8, 16) is None


def test_the_cheapest_is_chosen_and_the_reason_names_all():
    machine = Machine()
    for shape in (LLAMA_8B, LLAMA_70B_TP8, DEEPSEEK_V2):
        for c in (2, 4, 8, 16):
            tokens = 16_384 * c
            choice = choose(shape, cp_degree=c, tokens=tokens, squares=tokens**2 / 4, machine=machine)
            seconds = {
                name: price(name, shape, cp_degree=c, tokens=tokens, squares=tokens**2 / 4, machine=machine).seconds
                for name in EXCHANGES
                if refusal(name, shape, c) is None
            }
            assert seconds[choice.exchange] == min(seconds.values())
            assert all(name in choice.reason for name in seconds) and "\n" not in choice.reason


def test_rings_hide_under_attention_only_where_there_is_some():
    facts = {"cp_degree": 4, "tokens": 65_536, "machine": Machine()}
    short, long = (price("p2p", LLAMA_8B, squares=squares, **facts) for squares in (65_536 * 100, 65_536**2))
    assert short.hidden < 0.02 * short.transfer and long.hidden == pytest.approx(0.8 * long.transfer)


def test_an_auto_tier_costs_what_heads_for_sequence_cost():
    cost = PRESETS["deepseek-v2-h100"]
    auto, a2a, latent = (
        cost.tier_cost(Tier(packing_length=32_768, cp_degree=4, exchange=exchange))
        for exchange in ("auto", "a2a", "qkv_latent")
    )
    assert auto == a2a and latent.per_token < a2a.per_token and latent.per_square == a2a.per_square
