"""Seconds of packs, by hand."""

from dataclasses import replace

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import Recompute, Tier, parse_tiers
from megatron_hbp.planning.core.model import dense_model
from megatron_hbp.planning.cost.presets import PRESETS, preset

LLAMA = preset("llama3.1-8b-h100")
GEMM_WEIGHTS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
"""7.504e9: those of the layers and of the output head."""


def test_seconds_of_one_pack_by_hand():
    (tier,) = parse_tiers("131072:cp8:full28")
    tokens, squares, again = 131072, 131072**2, 28 / 32
    linear = tokens / 8 * 6 * GEMM_WEIGHTS * (3 + again) / 3 / 515e12
    attention = squares / 8 * 2 * 4096 * 32 * (3.5 + again) / 308e12
    exchange = tokens / 8 * 32 * 2 * (4096 + 1024 + 1024 + 4096) * (2 + again) * 7 / 8 / 129e9
    assert LLAMA.tier_cost(tier).seconds(tokens, squares) == pytest.approx(linear + attention + exchange + 0.188)


def test_time_falls_with_the_cp_degree_and_grows_with_recompute():
    seconds = [
        LLAMA.tier_cost(Tier(packing_length=65536, cp_degree=degree)).seconds(65536, 65536**2)
        for degree in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)
    plain, full = (
        LLAMA.tier_cost(Tier(packing_length=1024, recompute=r)).per_token
        for r in (Recompute(), Recompute(granularity="full", num_layers=32))
    )
    assert full == pytest.approx(plain * 4 / 3)


def test_selective_recompute_of_attention_adds_a_forward():
    plain, selective = (
        LLAMA.tier_cost(Tier(packing_length=1024, recompute=r))
        for r in (Recompute(), Recompute(granularity="selective", modules=("core_attn",)))
    )
    assert selective.per_square == pytest.approx(plain.per_square * 4.5 / 3.5)
    assert selective.per_token == plain.per_token


def test_crossing_nodes_costs_more():
    inside, outside = (LLAMA.tier_cost(Tier(packing_length=16384, cp_degree=c)).per_token * c for c in (8, 16))
    assert outside > inside


def test_recompute_that_fits():
    short, wide = (LLAMA.with_recompute(t) for t in parse_tiers("16384:cp1,131072:cp32"))
    assert (short.recompute.num_layers, wide.recompute.num_layers) == (28, 8)
    explicit = parse_tiers("16384:cp1:full5")[0]
    assert LLAMA.with_recompute(explicit) == explicit
    with pytest.raises(ConfigError, match="do not fit into memory"):
        LLAMA.with_recompute(parse_tiers("65536:cp1")[0])


def test_presets_have_names_and_unknown_ones_are_refused():
    assert {"llama3.1-8b-h100", "deepseek-v2-h100", "llama3.1-70b-h100-tp8", "qwen2.5-32b-h100-tp4"} == set(PRESETS)
    with pytest.raises(ConfigError, match="unknown cost model 'tpu'"):
        preset("tpu")


def test_ranks_of_several_gpus_share_work_and_links():
    """At TP 8 a rank is 8 GPUs: 8 times the FLOP/s, 8 query heads and one KV head each, 8 times the bytes and links."""
    cost = preset("llama3.1-70b-h100-tp8")
    tokens, squares = 131072, 131072**2
    weights = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 8192 * 128256
    linear = tokens / 8 * 6 * weights / (8 * 515e12)
    attention = squares / 8 * 2 * 8192 * 80 * 3.5 / (8 * 308e12)
    # eight ranks are eight nodes; heads for sequence: 8 query heads, and KV heads replicated up to the degree
    exchange = tokens / 8 * 80 * 2 * 8 * (8 + 8) * 256 * 7 / 8 * 2 / (8 * 45e9)
    (tier,) = parse_tiers("131072:cp8:exchange=a2a")
    assert cost.tier_cost(tier).seconds(tokens, squares) == pytest.approx(linear + attention + exchange + 0.47)


@pytest.mark.parametrize("exchange", ["a2a", "qkv_latent", "kv_latent", "all_gather", "p2p"])
def test_bytes_of_an_exchange_by_its_traits(exchange):
    cost = preset("deepseek-v2-h100")
    (tier,) = parse_tiers(f"32768:cp4:exchange={exchange}")
    elements = {
        "a2a": 81920 * 3 / 4, "qkv_latent": 2112 * 3 + 16384 * 3 / 4, "kv_latent": 576 * 3, "all_gather": 40960 * 3,
        "p2p": 40960 * 3,
    }[exchange]  # fmt: skip
    passes = 4 if exchange in ("p2p", "kv_latent") else 2
    bytes_seconds = cost.tier_cost(tier).per_token - cost.without_exchange().tier_cost(tier).per_token
    assert bytes_seconds == pytest.approx(60 * 2 * elements * passes / 45e9 / 4)


def test_the_supervised_share_decides_what_logits_cost():
    quarter = replace(LLAMA, supervised=0.25)
    assert LLAMA.linear_flops - quarter.linear_flops == 6 * 0.75 * 4096 * 128256


def test_an_auto_tier_is_priced_by_an_exchange_that_can_be_used():
    """Heads for sequence were priced at any degree, also where they do not divide."""
    nine = dense_model("nine", num_layers=4, hidden=576, num_heads=9, num_kv_heads=3, width=1536, vocabulary=1000)
    cost = replace(LLAMA, model=nine)
    for degree, exchange in ((2, "all_gather"), (3, "a2a"), (4, "all_gather")):
        auto, named = parse_tiers(f"1536:cp{degree}")[0], parse_tiers(f"1536:cp{degree}:exchange={exchange}")[0]
        assert cost.tier_cost(auto) == cost.tier_cost(named)
    with_heads = cost.tier_cost(parse_tiers("1536:cp2:exchange=a2a")[0])
    assert with_heads.per_token != cost.tier_cost(parse_tiers("1536:cp2")[0]).per_token


def test_an_auto_tier_costs_what_heads_for_sequence_cost():
    cost = PRESETS["deepseek-v2-h100"]
    auto, a2a, latent = (
        cost.tier_cost(Tier(packing_length=32_768, cp_degree=4, exchange=exchange))
        for exchange in ("auto", "a2a", "qkv_latent")
    )
    assert auto == a2a and latent.per_token < a2a.per_token and latent.per_square == a2a.per_square


def test_more_layers_than_there_are_are_refused():
    LLAMA.check_layers(parse_tiers("1024:cp1:full32"))
    with pytest.raises(ConfigError, match=r"1024:cp1:full33 recomputes more than the 32 layers of llama3\.1-8b-h100"):
        LLAMA.check_layers(parse_tiers("1024:cp1:full33"))


def test_attention_that_cannot_be_priced_is_refused():
    (_, layer) = LLAMA.model.layers[0]
    window = replace(layer, attention=replace(layer.attention, kind="window"))
    with pytest.raises(ConfigError, match="attention of kind window cannot be priced yet"):
        replace(LLAMA, model=replace(LLAMA.model, layers=((31, layer), (1, window))))
