"""Prices of exchanges, and which one is chosen."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_hbp.planning.core.exchanges import EXCHANGES, usable
from megatron_hbp.planning.core.machine import H100
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.cost.exchange import choose_exchange, price
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2

LLAMA_8B = AttentionShape(num_query_heads=32, num_kv_heads=8, qk_width=128, v_width=128)
LLAMA_70B_TP8 = AttentionShape(num_query_heads=64, num_kv_heads=8, qk_width=128, v_width=128).on_tensor_parallel_rank(8)
MLA = DEEPSEEK_V2.attention


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B_TP8, MLA], ids=["8B", "70B", "V2"])
@pytest.mark.parametrize("c", [2, 4, 8, 16])
def test_the_cheapest_is_chosen_and_the_reason_names_all(shape, c):
    facts: dict[str, Any] = {"cp_degree": c, "tokens": 16_384 * c, "squares": (16_384 * c) ** 2 / 4, "machine": H100}
    choice = choose_exchange(shape, **facts)
    seconds = {each.name: price(each, shape, **facts).seconds for each in usable(shape, c)}
    assert seconds[choice.exchange] == min(seconds.values())
    assert [one.seconds for one in choice.prices] == sorted(seconds.values())
    assert all(name in choice.reason for name in seconds) and "\n" not in choice.reason


def test_mirrored_slices_that_do_not_divide_leave_out_what_needs_them():
    facts: dict[str, Any] = {"cp_degree": 4, "tokens": 65_536, "squares": 65_536**2 / 4, "machine": H100}
    assert {one.exchange for one in choose_exchange(LLAMA_70B_TP8, **facts).prices} == {"a2a", "all_gather", "p2p"}
    assert choose_exchange(LLAMA_70B_TP8, **facts).exchange == "all_gather"
    plain = choose_exchange(LLAMA_70B_TP8, **facts, zigzag=False)
    assert [one.exchange for one in plain.prices] == ["a2a"]


def test_why_heads_are_not_exchanged_is_said_and_latents_that_are_none_are_no_news():
    facts: dict[str, Any] = {"cp_degree": 16, "tokens": 262_144, "squares": 1e10, "machine": H100}
    reason = choose_exchange(LLAMA_70B_TP8, **facts).reason
    assert "not a2a: CP degree 16 does not divide the 8 query heads" in reason and "latent" not in reason
    odd = replace(MLA, num_query_heads=120)
    assert (
        "not a2a" in choose_exchange(odd, **facts).reason and "not qkv_latent" in choose_exchange(odd, **facts).reason
    )


def test_bytes_over_the_slowest_link_in_both_passes():
    facts: dict[str, Any] = {"tokens": 65_536, "squares": 0.0, "machine": H100}
    for c, bandwidth in ((8, 129e9), (16, 45e9)):
        found = price(EXCHANGES["all_gather"], LLAMA_8B, cp_degree=c, **facts)
        assert found.transfer == pytest.approx(2 * 2 * 2_048 * (c - 1) * 65_536 / c / bandwidth)
        assert (found.hidden, found.extra) == (0, 0)
    ring = price(EXCHANGES["p2p"], LLAMA_8B, cp_degree=8, **facts)
    assert ring.transfer == pytest.approx(2 * 4 * 2_048 * 7 * 65_536 / 8 / 129e9)
    assert ring.extra == pytest.approx(7 * 65_536 / 8 * 32 * 256 * 12 / 3e12)  # merging partial results


def test_latents_are_up_projected_in_the_forward_and_three_times_in_the_backward():
    found = price(EXCHANGES["kv_latent"], MLA, cp_degree=4, tokens=65_536, squares=0.0, machine=H100)
    merging = 3 * 65_536 / 4 * 128 * 320 * 12 / 3e12
    assert found.extra - merging == pytest.approx(4 * 2 * 512 * 128 * 256 * 3 * 65_536 / 4 / 515e12)


def test_rings_hide_under_attention_only_where_there_is_some():
    facts: dict[str, Any] = {"cp_degree": 4, "tokens": 65_536, "machine": H100}
    ring = EXCHANGES["p2p"]
    short, long = (price(ring, LLAMA_8B, squares=squares, **facts) for squares in (65_536 * 100, 65_536**2))
    assert short.hidden < 0.02 * short.transfer and long.hidden == pytest.approx(0.8 * long.transfer)
