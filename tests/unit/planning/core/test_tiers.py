"""Tiers as the command line writes them."""

from dataclasses import replace

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import Recompute, Tier, parse_tiers
from megatron_hbp.planning.core.tiers import full_layers


def test_plain_tiers():
    short, long = parse_tiers("16384:cp1,131072:cp8")
    assert (short.packing_length, short.cp_degree, short.local_tokens) == (16384, 1, 16384)
    assert (long.packing_length, long.cp_degree, long.local_tokens) == (131072, 8, 16384)
    assert short.recompute == Recompute() and short.layout == short.exchange == "auto" and short.alignment == 1


def test_suffixes_in_any_order():
    (tier,) = parse_tiers("1024:zigzag:sel=core_attn+mlp:align16:cp2")
    assert tier == Tier(
        packing_length=1024,
        cp_degree=2,
        recompute=Recompute(granularity="selective", modules=("core_attn", "mlp")),
        layout="zigzag",
        alignment=16,
    )


def test_only_tiers_that_name_no_recompute_are_completed():
    """Nothing could be told from nothing named: `:none` is a choice."""
    tiers = parse_tiers("64:cp1,128:cp1:none,256:cp1:full3", fill=lambda tier: replace(tier, recompute=full_layers(2)))
    assert [tier.recompute for tier in tiers] == [full_layers(2), Recompute(), full_layers(3)]
    assert parse_tiers("64:cp1:none") == parse_tiers("64:cp1")


@pytest.mark.parametrize("text", ["16384:cp1:full28", "96:cp3", "1024:cp2:sel=core_attn+mlp:zigzag:align16"])
def test_printing_a_tier_reads_back(text):
    (tier,) = parse_tiers(text)
    assert parse_tiers(str(tier)) == (tier,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a whole number"),
        ("16384", "names no CP degree"),
        ("16384:cp0", "at least 1"),
        ("16384:cp1:cp2", "given twice"),
        ("16384:cp1:none:full3", "given twice"),
        ("16384:cp1:sel=", "at least one module"),
        ("16384:cp2:exchange=a2b", "exchange must be one of a2a, all_gather"),
        ("16384:cp1:fast", "'fast' is unknown"),
        ("16384:cp1:full", "not a whole number"),
        ("16384:cp1:full0", "at least 1"),
        ("1000:cp3", "not a multiple of 3"),
        ("16384:cp1,8192:cp1", "must grow"),
        ("8192:cp4,16384:cp1", "must grow"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_tiers(text)
