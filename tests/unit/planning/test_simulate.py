"""Simulated epochs: identities, prices by hand, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from megatron_hbp.planning.simulate.topology import SHAPES, Topology, gradient_sync, place_cost

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.simulate.breakdown import pack_pieces
from megatron_hbp.planning.simulate.simulator import gang_seconds, simulate

LLAMA, DEEPSEEK = preset("llama3.1-8b-h100"), preset("deepseek-v2-h100")
TIERS = parse_tiers("16384:cp1:full28,32768:cp2:full28,65536:cp4:full23,131072:cp8:full28")
LENGTHS = generate("mix", num_samples=30_000)
SHARDED = Topology(num_nodes=4, fully_sharded=True)


def plan_of(ranks=32, slots=8, cost=LLAMA, tiers=TIERS, **options):
    return make_plan(
        Samples.of(LENGTHS),
        Request(tiers=tiers, num_ranks=ranks, step_tokens=slots * ranks * 16384, cost=cost, **options),
    )


@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
def test_without_a_pipeline_an_epoch_is_what_the_metrics_say(schedule):
    plan = plan_of(schedule=schedule)
    found, measured = simulate(plan, LLAMA, SHARDED), plan_metrics(plan, LLAMA)
    assert found.epoch_seconds == pytest.approx(measured.epoch_seconds)
    assert found.idle()["imbalance"] == pytest.approx(measured.idle)
    assert found.gpu_days == pytest.approx(measured.epoch_seconds * 32 / 86400)


def test_lockstep_is_the_sum_of_the_slowest_packs():
    plan = plan_of(ranks=8, slots=2)
    seconds = LLAMA.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    slowest = {}
    for step, slot, value in zip(plan.pack_step, plan.pack_slot, seconds, strict=True):
        slowest[step, slot] = max(slowest.get((step, slot), 0.0), value)
    found = simulate(plan, LLAMA, Topology(num_nodes=1, fully_sharded=True))
    assert found.epoch_seconds == pytest.approx(sum(slowest.values()))


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        (SHARDED, {}),
        (Topology(num_nodes=4), {"schedule": "gang"}),
        (Topology(num_nodes=4, tp=2, pp=2), {}),
        (Topology(num_nodes=8, pp=4, virtual_stages=2, overlap=0.2, overlap_gradients=False), {"slot_multiple": 4}),
        (Topology(num_nodes=16, pp=4, ep=8, overlap=0.3), {"cost": DEEPSEEK}),
        (Topology(num_nodes=16, pp=2, tp=2, ep=16), {"cost": DEEPSEEK}),
    ],
)
def test_every_second_of_every_rank_has_a_cause(topology, options):
    cost = options.get("cost", LLAMA)
    found = simulate(plan_of(ranks=topology.num_ranks, **options), cost, topology)
    per_rank = sum(found.by_rank().values())
    assert per_rank == pytest.approx(np.full(topology.num_ranks, found.epoch_seconds), rel=1e-12)
    parts = (found.imbalance, found.exchange, found.expert, found.bubble, found.sync, found.compute)
    assert min(part.min() for part in parts) > -1e-9
    busy = found.compute.sum() / topology.num_ranks / found.epoch_seconds
    assert sum(found.idle().values()) + busy == pytest.approx(1, rel=1e-12)
    by_step = found.compute + found.exchange + found.expert + found.imbalance
    by_step = by_step + (found.bubble + found.sync + found.cost.step_seconds)[:, None]
    assert by_step == pytest.approx(np.repeat(found.wall[:, None], topology.num_ranks, axis=1), rel=1e-12)


def test_gangs_wait_for_all_their_ranks():
    plan = plan_of(ranks=8, slots=4, schedule="gang")
    seconds = np.random.default_rng(0).random(plan.num_packs)
    free = np.zeros((plan.num_steps, 8))
    for index in range(plan.num_packs):  # sorted by step and slot
        pack = plan.pack(index)
        ranks = slice(pack.rank0, pack.rank0 + plan.tiers[pack.tier].cp_degree)
        free[pack.step, ranks] = free[pack.step, ranks].max() + seconds[index]
    assert gang_seconds(plan, seconds) == pytest.approx(free.max(axis=1))


def pieces_of(cost, topology, tier="131072:cp8:full30", tokens=131072, squares=10**9):
    return pack_pieces(
        parse_tiers(tier), np.array([0]), np.array([tokens]), np.array([squares]), cost=cost, topology=topology,
        shape=SHAPES[cost.name],
    )  # fmt: skip


def test_pieces_of_a_pack_by_hand():
    found = pieces_of(LLAMA, SHARDED, "131072:cp8:full28")
    local, again = 131072 / 8, 28 / 32
    exchange = local * 32 * 20480 * (2 + again) * 7 / 8 / 129e9
    linear, attention = local * 45e9 / 515e12, 10**9 / 8 * 2 * 4096 * 32 / 308e12
    assert found.exchange[0] == pytest.approx(exchange)
    assert found.compute[0] == pytest.approx(linear * (3 + again) / 3 + attention * (3.5 + again) + 0.188)
    assert found.forward[0] == pytest.approx(linear / 3 + attention + exchange / (2 + again) + 0.188 / 3)
    assert found.total[0] == pytest.approx(LLAMA.tier_cost(parse_tiers("131072:cp8:full28")[0]).seconds(131072, 10**9))


def test_the_expert_all_to_all_by_hand():
    topology = Topology(num_nodes=32, ep=8)
    found = pieces_of(DEEPSEEK, topology)
    assert found.expert[0] == pytest.approx(131072 / 8 * 59 * 2 * 6 * 5120 * 2 * 7 / 8 * 2.5 / 45e9)
    # the preset's 207 TFLOP/s hold an all-to-all of EP 8; apart they take as long
    placed = place_cost(DEEPSEEK, topology, SHAPES[DEEPSEEK.name])
    apart = 6 * 21e9 / placed.linear_rate + 59 * 2 * 6 * 5120 * 2 * 7 / 8 * 2 / 45e9
    assert apart == pytest.approx(6 * 21e9 / DEEPSEEK.linear_rate, rel=0.01)


def test_cp_and_ep_compete_for_the_link_they_share():
    both_inside = pieces_of(DEEPSEEK, Topology(num_nodes=32, ep=8, overlap=0.1))
    ep_outside = pieces_of(DEEPSEEK, Topology(num_nodes=32, ep=16, overlap=0.1))
    window = 0.1 * both_inside.compute[0]
    assert both_inside.contention[0] == pytest.approx(window)  # one window for both, where each could fill it
    assert ep_outside.contention[0] == 0
    plain = pieces_of(DEEPSEEK, Topology(num_nodes=32, ep=8))
    hidden = plain.exchange + plain.expert - both_inside.exchange - both_inside.expert
    assert hidden[0] == pytest.approx(window)
    assert plain.contention[0] == 0
    all_hidden = pieces_of(LLAMA, replace(SHARDED, overlap=1.0))
    assert all_hidden.exchange[0] == 0


def test_gradient_sync_by_hand_and_hidden():
    topology = Topology(num_nodes=4)
    shape = SHAPES[LLAMA.name]
    reduce, gather = gradient_sync(shape, LLAMA, topology)
    assert reduce == pytest.approx(4 * 8.03e9 * 31 / 32 / 45e9)
    assert gather == pytest.approx(reduce / 2)
    assert gradient_sync(shape, LLAMA, SHARDED) == (0.0, 0.0)
    plan = plan_of()
    shown = simulate(plan, LLAMA, replace(topology, overlap_gradients=False))
    assert shown.sync == pytest.approx(np.full(plan.num_steps, reduce + gather))
    assert simulate(plan, LLAMA, topology).sync.sum() < shown.sync.sum() / 2
    expert = gradient_sync(SHAPES[DEEPSEEK.name], DEEPSEEK, Topology(num_nodes=32, ep=32))
    assert expert[0] < gradient_sync(SHAPES[DEEPSEEK.name], DEEPSEEK, Topology(num_nodes=32, ep=8))[0]


def test_tensor_parallel_ranks_are_faster_but_not_by_their_number():
    shape = SHAPES[LLAMA.name]
    two = place_cost(LLAMA, Topology(num_nodes=4, tp=2), shape)
    assert LLAMA.linear_rate < two.linear_rate < 2 * LLAMA.linear_rate
    assert (two.attention_rate, two.node_size) == (2 * LLAMA.attention_rate, 4)
    # heads of a rank, all of whose bandwidth is for them: as many bytes, twice the links, and key heads are replicated
    tiers = parse_tiers("32768:cp2,65536:cp4,131072:cp8,262144:cp16")
    for one, both in ((LLAMA.tier_cost(tier).per_token, two.tier_cost(tier).per_token) for tier in tiers):
        assert both < one
    eight = place_cost(LLAMA, Topology(num_nodes=4, tp=8), shape)
    assert eight.tensor_parallel == 8
    with pytest.raises(ConfigError, match=r"exchange by a2a at TP 8: CP degree 8 does not divide the 4 query heads"):
        simulate(plan_of(ranks=8), LLAMA, Topology(num_nodes=8, tp=8))
    seventy = preset("llama3.1-70b-h100-tp8")
    assert place_cost(seventy, Topology(num_nodes=4, tp=8), SHAPES[seventy.name]) == seventy


def test_memory_of_the_8b_settings_in_the_papers_table():
    """What the paper ran fits 80 GB with everything sharded; without recompute 16K on a GPU does not."""
    for tier in ("16384:cp1:full28", "131072:cp8:full29"):
        plan = plan_of(tiers=parse_tiers(tier if "131072" in tier else f"{tier},131072:cp8:full28"))
        assert simulate(plan, LLAMA, SHARDED).memory.headroom > 0
    memory = simulate(plan_of(tiers=parse_tiers("16384:cp1,131072:cp8")), LLAMA, SHARDED).memory
    assert memory.headroom < 0
    modules = simulate(plan_of(tiers=parse_tiers("16384:cp1:sel=mlp,131072:cp8:sel=mlp")), LLAMA, SHARDED).memory
    assert modules.peak > memory.peak  # shapes do not tell what modules keep: nothing saved, one of them rebuilt
    assert memory.activations == pytest.approx(16384 * 32 * 139264, rel=0.01)


def test_pipelines_need_memory_for_the_micro_batches_in_flight():
    plan = plan_of(ranks=8, slots=16, slot_multiple=4)
    plain, interleaved = (simulate(plan, LLAMA, Topology(num_nodes=4, pp=4, virtual_stages=v)) for v in (1, 2))
    assert interleaved.memory.activations > plain.memory.activations
    assert interleaved.bubble.sum() < plain.bubble.sum()


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ({"num_nodes": 0}, {}, "num_nodes must be at least 1"),
        ({"num_nodes": 2}, {}, "the plan is for 32 data-parallel ranks, 16 GPUs"),
        ({"num_nodes": 8, "pp": 2}, {"schedule": "gang"}, "gang plans need PP 1"),
        ({"num_nodes": 4, "ep": 8}, {}, "has no experts"),
        ({"num_nodes": 12, "pp": 3}, {}, "32 layers do not divide into 3 chunks"),
        ({"num_nodes": 16, "pp": 4, "virtual_stages": 2}, {"slots": 7}, "plan with --slot-multiple 4"),
        ({"num_nodes": 4, "tp": 3}, {}, "do not divide into tensor-parallel groups of 3"),
        ({"num_nodes": 4, "virtual_stages": 2}, {}, "virtual stages need a pipeline"),
        ({"num_nodes": 1, "pp": 3}, {}, "8 GPUs do not divide by TP 1 x PP 3"),
        ({"num_nodes": 4, "ep": 5}, {}, "32 data-parallel ranks do not divide by EP 5"),
        ({"num_nodes": 4, "overlap": 1.5}, {}, "overlap is a share"),
    ],
)
def test_what_cannot_run_is_refused(topology, options, message):
    with pytest.raises(ConfigError, match=message):
        simulate(plan_of(**options), LLAMA, Topology(**topology))


def test_models_without_a_shape_and_the_wrong_tensor_width():
    unknown = replace(LLAMA, name="mine")
    plan = plan_of()
    assert simulate(plan, unknown, SHARDED).memory is None
    with pytest.raises(ConfigError, match="its shape is unknown"):
        simulate(plan, unknown, Topology(num_nodes=8, tp=2))
    wide = replace(unknown, tensor_parallel=2)
    assert simulate(plan, wide, Topology(num_nodes=8, tp=2)).topology.num_gpus == 64
    with pytest.raises(ConfigError, match="set --tp 2"):
        simulate(plan, wide, SHARDED)
    with pytest.raises(ConfigError, match="set --tp 8"):
        simulate(plan, preset("llama3.1-70b-h100-tp8"), Topology(num_nodes=8, tp=2))
