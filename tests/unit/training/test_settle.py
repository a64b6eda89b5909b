"""Which exchange a tier runs with: its own, the flag's, or the cheapest; and what cannot be is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import H100
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2
from megatron_hbp.training.settle import settle, settle_tiers
from tests.equivalence.plans import plan_of

LLAMA_70B_TP8 = AttentionShape(num_query_heads=8, num_kv_heads=1, qk_width=128, v_width=128)
LENGTHS = np.array([1000, 30_000, 60_000])


def plan_with(**choices: Any):
    tiers = [
        Tier(packing_length=16_384), Tier(packing_length=32_768, cp_degree=2, **choices),
        Tier(packing_length=65_536, cp_degree=4),
    ]  # fmt: skip
    packs = [(0, 0, 0, 0, [0]), (0, 1, 0, 1, [1]), (0, 2, 0, 2, [2])]
    return plan_of(packs, tiers=tiers, lengths=LENGTHS, num_ranks=4)


def settled(shape=LLAMA_70B_TP8, exchange=None):
    return settle_tiers(plan_with(), shape, H100, exchange=exchange, kernel=None)


def test_auto_takes_the_cheapest_and_says_why():
    tiers, lines = settled()
    assert [tier.exchange for tier in tiers] == ["a2a", "all_gather", "all_gather"]  # one KV head: keys are little
    assert [tier.is_zigzag for tier in tiers] == [False, True, True]
    assert len(lines) == 2 and all("exchange all_gather (exposed per layer: all_gather" in line for line in lines)
    assert [tier.exchange for tier in settled(DEEPSEEK_V2.attention)[0]] == ["a2a", "qkv_latent", "qkv_latent"]


def test_a_tier_keeps_its_own_exchange_and_a_flag_overrides_it():
    tiers, lines = settled()
    own, said = settle_tiers(plan_with(exchange="p2p"), LLAMA_70B_TP8, H100, exchange=None, kernel=None)
    assert own[1].exchange == "p2p" and "p2p (as asked for)" in said[0] and own[2] == tiers[2] and lines[1] == said[1]
    over, _ = settle_tiers(plan_with(exchange="p2p"), LLAMA_70B_TP8, H100, exchange="a2a", kernel="reference")
    assert [tier.exchange for tier in over] == ["a2a"] * 3 and {tier.kernel for tier in over} == {"reference"}


def test_an_exchange_that_cannot_be_is_refused_with_those_that_can():
    with pytest.raises(ConfigError) as refused:
        settled(exchange="kv_latent")
    assert "no latent attention" in str(refused.value) and "a2a, all_gather, p2p" in str(refused.value)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"multi_latent_attention": False}, "give --multi-latent-attention"),
        ({"fp8": "e4m3"}, "drop --fp8-format"),
        ({"mla_down_proj_fusion": True}, "drop --mla-down-proj-fusion"),
    ],
)
def test_the_true_reason_why_latents_cannot_be_exchanged_reaches_the_user(monkeypatch, changes, why):
    """An MLA model under FP8 was said to have no latent attention."""
    mla = {"multi_latent_attention": True, "fp8": None, "fp4": None, "mla_down_proj_fusion": False}
    model = arguments(
        num_attention_heads=128, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128, q_lora_rank=1536,
        kv_lora_rank=512, hbp_exchange="qkv_latent", hbp_kernel=None, params_dtype=torch.bfloat16, **mla | changes,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    options = SimpleNamespace(train=SimpleNamespace(plan=plan_with()), valid=None)
    with pytest.raises(ConfigError, match=f"exchange qkv_latent cannot be used: .*{why}") as refused:
        settle(model, model, options)
    assert "one of a2a, all_gather, p2p" in str(refused.value) and "no latent attention" not in str(refused.value)
    model.hbp_exchange = "a2a"
    settle(model, model, options)


def test_without_a_device_the_first_that_can_be_used_is_taken():
    tiers, lines = settle_tiers(plan_with(), DEEPSEEK_V2.attention, None, exchange=None, kernel=None)
    assert [tier.exchange for tier in tiers] == ["a2a"] * 3 and all("no CUDA device" in line for line in lines)


def test_zigzag_that_does_not_divide_is_not_chosen():
    tiers = [Tier(packing_length=64), Tier(packing_length=126, cp_degree=2)]
    plan = plan_of([(0, 0, 0, 1, [0])], tiers=tiers, lengths=np.array([100]), num_ranks=2)
    found, _ = settle_tiers(plan, LLAMA_70B_TP8, H100, exchange=None, kernel=None)
    assert found[1].exchange == "a2a" and not found[1].is_zigzag


def arguments(**changes: object) -> SimpleNamespace:
    values = {
        "num_attention_heads": 64, "group_query_attention": True, "num_query_groups": 8, "kv_channels": 128,
        "hidden_size": 8192, "multi_latent_attention": False, "tensor_model_parallel_size": 8, "num_layers": 2,
        "num_experts": None, "swiglu": True, "ffn_hidden_size": 28_672, "padded_vocab_size": 128_256,
        "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)
