"""Cost models on a topology."""

from dataclasses import replace

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.simulate.placement import gradient_sync, place_cost, with_experts_apart
from megatron_hbp.planning.simulate.simulator import simulate
from tests.unit.planning.plans import plan_of
from tests.unit.planning.profiles import PLANTED

LLAMA, DEEPSEEK = preset("llama3.1-8b-h100"), preset("deepseek-v2-h100")
PARAMETERS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 2 * 4096 * 128256
"""8.03e9."""


def test_gradient_sync_by_hand():
    reduce, gather = gradient_sync(LLAMA, Topology(num_nodes=4))
    assert reduce == pytest.approx(4 * PARAMETERS * 31 / 32 / 45e9)
    assert gather == pytest.approx(reduce / 2)
    assert gradient_sync(LLAMA, Topology(num_nodes=4, fully_sharded=True)) == (0.0, 0.0)
    assert gradient_sync(LLAMA, Topology(num_nodes=1))[0] == pytest.approx(4 * PARAMETERS * 7 / 8 / 129e9)
    halves = gradient_sync(LLAMA, Topology(num_nodes=4, tp=2, pp=2))[0]  # 8 ranks, a quarter of the model each
    assert halves == pytest.approx(4 * PARAMETERS / 4 * 7 / 8 / 45e9)
    more_experts_apart, fewer = (gradient_sync(DEEPSEEK, Topology(num_nodes=32, ep=ep))[0] for ep in (32, 8))
    assert more_experts_apart < fewer


def test_tensor_parallel_ranks_are_faster_but_not_by_their_number():
    two = place_cost(LLAMA, Topology(num_nodes=4, tp=2))
    assert LLAMA.rank.linear_rate < two.rank.linear_rate < 2 * LLAMA.rank.linear_rate
    assert (two.rank.attention_rate, two.rank.node_size) == (2 * LLAMA.machine.attention_rate, 4)
    # heads of a rank, all of whose bandwidth is for them: as many bytes, twice the links, and key heads are replicated
    tiers = parse_tiers("32768:cp2,65536:cp4,131072:cp8,262144:cp16")
    for one, both in ((LLAMA.tier_cost(tier).per_token, two.tier_cost(tier).per_token) for tier in tiers):
        assert both < one
    assert place_cost(LLAMA, Topology(num_nodes=4, tp=8)).tensor_parallel == 8
    seventy = preset("llama3.1-70b-h100-tp8")
    assert place_cost(seventy, Topology(num_nodes=4, tp=8)) == seventy
    assert place_cost(two, Topology(num_nodes=4, tp=2)) == two


def test_gemms_of_two_gpus_by_hand():
    two = place_cost(LLAMA, Topology(num_nodes=4, tp=2))
    (tier,) = parse_tiers("1024:cp1")
    weights = PARAMETERS - 4096 * 128256
    collectives = 3 * 32 * 8 * 4096 * (1 / 2) / 129e9
    assert two.tier_cost(tier).per_token == pytest.approx(6 * weights / (2 * 515e12) + collectives)
    assert two.tier_cost(tier).per_square == pytest.approx(LLAMA.tier_cost(tier).per_square / 2)


def test_a_node_of_fewer_gpus_ends_its_fast_links_sooner():
    (tier,) = parse_tiers("131072:cp8")
    small = place_cost(LLAMA, Topology.of_ranks(12))
    assert small.machine.node_size == 4
    assert small.tier_cost(tier).per_token > LLAMA.tier_cost(tier).per_token


def test_rates_of_several_gpus_are_those_of_their_number():
    for cost, tp in ((preset("llama3.1-70b-h100-tp8"), 2), (preset("qwen2.5-32b-h100-tp4"), 1)):
        with pytest.raises(ConfigError, match=f"is the cost of ranks of {cost.tensor_parallel} GPUs; set --tp"):
            place_cost(cost, Topology(num_nodes=8, tp=tp))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_cost_model_of_ones_own_is_simulated_at_any_tensor_parallel_width_and_keeps_its_memory(tp):
    """Shapes were known of the four presets alone, by name: another one had no memory, and no other TP."""
    mine = replace(PLANTED.with_machine(memory=1e9, memory_reserve=0.0), name="mine")
    plan = plan_of([500] * 64, "1024:cp1:full2,4096:cp2", num_ranks=8, step_tokens=16384, cost=mine)
    found = simulate(plan, mine, Topology(num_nodes=tp, tp=tp))
    # four layers of q, k, v, o and the MLP, two embeddings; 8 ranks share Adam's 12 bytes
    parameters = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 8192) + 2 * 512 * 100_000
    assert found.memory is not None
    assert found.memory.states == pytest.approx(parameters / tp * (6 + 12 / 8))
    assert found.memory.limit == 1e9 and found.memory.activations > 0


def test_experts_are_priced_apart_only_where_there_are_some():
    with pytest.raises(ConfigError, match=r"llama3\.1-8b-h100 has no experts; leave --ep out"):
        with_experts_apart(LLAMA, Topology(num_nodes=1, ep=8))
    assert with_experts_apart(LLAMA, Topology(num_nodes=1)) == LLAMA
    assert with_experts_apart(DEEPSEEK, Topology(num_nodes=1)) == DEEPSEEK
    never_held = replace(DEEPSEEK, linear_rate_without_experts=None)
    assert with_experts_apart(never_held, Topology(num_nodes=1, ep=8)) == never_held


def test_experts_apart_and_tensor_parallel_ranks_come_in_any_order():
    """Commands place a cost model before `simulate` takes the experts apart: the collectives of TP were lost then."""
    topology = Topology(num_nodes=16, tp=2, ep=8)
    first = place_cost(with_experts_apart(DEEPSEEK, topology), topology)
    then = with_experts_apart(place_cost(DEEPSEEK, topology), topology)
    assert first.machine.linear_rate < 385e12
    assert then.machine.linear_rate == pytest.approx(first.machine.linear_rate)
