"""Where the seconds of a pack go, by hand."""

import numpy as np
import pytest

from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.simulate.breakdown import break_down
from megatron_hbp.planning.simulate.placement import place_cost, with_experts_apart

LLAMA, DEEPSEEK = preset("llama3.1-8b-h100"), preset("deepseek-v2-h100")
SHARDED = Topology(num_nodes=4, fully_sharded=True)
GEMM_WEIGHTS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
"""7.504e9: those of the 8B's layers and of its output head."""


def parts_of(cost, topology, tier="131072:cp8:full30", tokens=131072, squares=10**9, overlap=0.0):
    return break_down(
        parse_tiers(tier), np.array([0]), np.array([tokens]), np.array([squares]), cost=cost, topology=topology,
        overlap=overlap,
    )  # fmt: skip


def test_parts_of_a_pack_by_hand():
    found = parts_of(LLAMA, SHARDED, "131072:cp8:full28")
    local, again = 131072 / 8, 28 / 32
    exchange = local * 32 * 20480 * (2 + again) * 7 / 8 / 129e9
    linear, attention = local * 6 * GEMM_WEIGHTS / 515e12, 10**9 / 8 * 2 * 4096 * 32 / 308e12
    assert found.exchange[0] == pytest.approx(exchange)
    assert found.compute[0] == pytest.approx(linear * (3 + again) / 3 + attention * (3.5 + again) + 0.188)
    assert found.forward[0] == pytest.approx(linear / 3 + attention + exchange / (2 + again) + 0.188 / 3)
    assert found.total[0] == pytest.approx(LLAMA.tier_cost(parse_tiers("131072:cp8:full28")[0]).seconds(131072, 10**9))


@pytest.mark.parametrize(("exchange", "share"), [("a2a", 1 / 2), ("all_gather", 1 / 2), ("p2p", 1 / 4)])
def test_the_forward_takes_its_share_of_an_exchange(exchange, share):
    """A ring passes keys once more in the backward, and their gradients in fp32: it was given half of its seconds."""
    tier = f"131072:cp8:exchange={exchange}"
    with_links, without = parts_of(LLAMA, SHARDED, tier), parts_of(LLAMA.without_exchange(), SHARDED, tier)
    assert without.exchange[0] == 0
    assert with_links.forward[0] - without.forward[0] == pytest.approx(share * with_links.exchange[0])


def test_the_forward_of_latents_in_a_ring_takes_a_quarter_of_the_bytes():
    tier = "131072:cp8:exchange=kv_latent"
    with_links, without = parts_of(DEEPSEEK, SHARDED, tier), parts_of(DEEPSEEK.without_exchange(), SHARDED, tier)
    assert with_links.forward[0] - without.forward[0] == pytest.approx(with_links.exchange[0] / 4)


def test_the_expert_all_to_all_by_hand():
    topology = Topology(num_nodes=32, ep=8)
    found = parts_of(DEEPSEEK, topology)
    assert found.expert[0] == pytest.approx(131072 / 8 * 59 * 2 * 6 * 5120 * 2 * 7 / 8 * 2.5 / 45e9)
    # the preset's 207 TFLOP/s hold an all-to-all of EP 8; apart they take as long
    attention = 5120 * 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 * 128 * 256 + 128 * 128 * 5120
    experts = 3 * 5120 * (6 * 1536 + 3072) + 5120 * 160
    weights = 60 * attention + 3 * 5120 * 12288 + 59 * experts + 5120 * 102400
    placed = place_cost(with_experts_apart(DEEPSEEK, topology), topology)
    assert (placed.machine.linear_rate, DEEPSEEK.machine.linear_rate) == (385e12, 207e12)
    apart = 6 * weights / 385e12 + 59 * 2 * 6 * 5120 * 2 * 7 / 8 * 2 / 45e9
    assert apart == pytest.approx(6 * weights / 207e12, rel=0.01)


def test_cp_and_ep_compete_for_the_link_they_share():
    both_inside = parts_of(DEEPSEEK, Topology(num_nodes=32, ep=8), overlap=0.1)
    ep_outside = parts_of(DEEPSEEK, Topology(num_nodes=32, ep=16), overlap=0.1)
    window = 0.1 * both_inside.compute[0]
    assert both_inside.contention[0] == pytest.approx(window)  # one window for both, where each could fill it
    assert ep_outside.contention[0] == 0
    plain = parts_of(DEEPSEEK, Topology(num_nodes=32, ep=8))
    hidden = plain.exchange + plain.expert - both_inside.exchange - both_inside.expert
    assert hidden[0] == pytest.approx(window)
    assert plain.contention[0] == 0
    assert parts_of(LLAMA, SHARDED, overlap=1.0).exchange[0] == 0
