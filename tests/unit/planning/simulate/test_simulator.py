"""Simulated epochs: identities, and what is refused."""

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.simulate.placement import gradient_sync
from megatron_hbp.planning.simulate.simulator import gang_seconds, simulate
from tests.unit.planning import plans

LLAMA, DEEPSEEK = preset("llama3.1-8b-h100"), preset("deepseek-v2-h100")
TIERS = "16384:cp1:full28,32768:cp2:full28,65536:cp4:full23,131072:cp8:full28"
LENGTHS = generate("mix", num_samples=30_000)
SHARDED = Topology(num_nodes=4, fully_sharded=True)


def plan_of(ranks=32, slots=8, cost=LLAMA, tiers=TIERS, **options):
    return plans.plan_of(LENGTHS, tiers, num_ranks=ranks, step_tokens=slots * ranks * 16384, cost=cost, **options)


def memory_of(plan, topology=SHARDED, cost=LLAMA):
    memory = simulate(plan, cost, topology).memory
    assert memory is not None
    return memory


@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
def test_without_a_pipeline_an_epoch_is_what_the_metrics_say(schedule):
    plan = plan_of(schedule=schedule)
    found, measured = simulate(plan, LLAMA, SHARDED), plan_metrics(plan, LLAMA)
    assert found.epoch_seconds == pytest.approx(measured.epoch_seconds)
    assert found.idle()["imbalance"] == pytest.approx(measured.idle)
    assert found.gpu_days == pytest.approx(measured.epoch_seconds * 32 / 86400)
    assert found.tokens_per_gpu_second == pytest.approx(LENGTHS.sum() / measured.epoch_seconds / 32)


def test_lockstep_is_the_sum_of_the_slowest_packs():
    plan = plan_of(ranks=8, slots=2)
    seconds = LLAMA.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    slowest: dict[tuple[int, int], float] = {}
    for step, slot, value in zip(plan.pack_step, plan.pack_slot, seconds, strict=True):
        slowest[step, slot] = max(slowest.get((step, slot), 0.0), value)
    found = simulate(plan, LLAMA, Topology(num_nodes=1, fully_sharded=True))
    assert found.epoch_seconds == pytest.approx(sum(slowest.values()))


@pytest.mark.parametrize(
    ("topology", "how", "options"),
    [
        (SHARDED, {}, {}),
        (Topology(num_nodes=4), {}, {"schedule": "gang"}),
        (Topology(num_nodes=4, tp=2, pp=2), {}, {}),
        (
            Topology(num_nodes=8, pp=4, virtual_stages=2),
            {"overlap": 0.2, "overlap_gradients": False},
            {"slot_multiple": 4},
        ),
        (Topology(num_nodes=16, pp=4, ep=8), {"overlap": 0.3}, {"cost": DEEPSEEK}),
        (Topology(num_nodes=16, pp=2, tp=2, ep=16), {}, {"cost": DEEPSEEK}),
    ],
)
def test_every_second_of_every_rank_has_a_cause(topology, how, options):
    cost = options.get("cost", LLAMA)
    found = simulate(plan_of(ranks=topology.num_ranks, **options), cost, topology, **how)
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


def test_gradient_sync_is_shown_or_hidden():
    topology, plan = Topology(num_nodes=4), plan_of()
    shown = simulate(plan, LLAMA, topology, overlap_gradients=False)
    assert shown.sync == pytest.approx(np.full(plan.num_steps, sum(gradient_sync(LLAMA, topology))))
    assert simulate(plan, LLAMA, topology).sync.sum() < shown.sync.sum() / 2
    assert simulate(plan, LLAMA, SHARDED).sync.sum() == 0


def test_heads_that_do_not_divide_are_priced_by_another_exchange_unless_the_tier_names_one():
    """At TP 8 four query heads are left of a rank: an `auto` tier was refused, though the run would have taken it."""
    topology = Topology(num_nodes=8, tp=8)
    assert simulate(plan_of(ranks=8), LLAMA, topology).exchange.sum() > 0
    named = plan_of(ranks=8, tiers="16384:cp1:full28,131072:cp8:full28:exchange=a2a")
    with pytest.raises(ConfigError, match=r"exchange by a2a at TP 8: CP degree 8 does not divide the 4 query heads"):
        simulate(named, LLAMA, topology)


def test_memory_of_the_8b_settings_in_the_papers_table():
    """What the paper ran fits 80 GB with everything sharded; without recompute 16K on a GPU does not."""
    for tiers in ("16384:cp1:full28,131072:cp8:full28", "131072:cp8:full29"):
        assert memory_of(plan_of(tiers=tiers)).headroom > 0
    memory = memory_of(plan_of(tiers="16384:cp1,131072:cp8"))
    assert memory.headroom < 0
    modules = memory_of(plan_of(tiers="16384:cp1:sel=mlp,131072:cp8:sel=mlp"))
    assert modules.peak > memory.peak  # shapes do not tell what modules keep: nothing saved, one of them rebuilt
    assert memory.activations == pytest.approx(16384 * 32 * 139264, rel=0.01)


def test_pipelines_need_memory_for_the_micro_batches_in_flight():
    plan = plan_of(ranks=8, slots=16, slot_multiple=4)
    topologies = [Topology(num_nodes=4, pp=4, virtual_stages=v) for v in (1, 2)]
    kept, kept_interleaved = (memory_of(plan, topology).activations for topology in topologies)
    assert kept_interleaved > kept
    plain, interleaved = (simulate(plan, LLAMA, topology) for topology in topologies)
    assert interleaved.bubble.sum() < plain.bubble.sum()


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ({"num_nodes": 2}, {}, "the plan is for 32 data-parallel ranks, 16 GPUs"),
        ({"num_nodes": 8, "pp": 2}, {"schedule": "gang"}, "gang plans require PP 1"),
        ({"num_nodes": 4, "ep": 8}, {}, "has no experts"),
        ({"num_nodes": 12, "pp": 3}, {}, "32 layers do not divide into 3 chunks"),
        ({"num_nodes": 16, "pp": 4, "virtual_stages": 2}, {"slots": 7}, "plan with --slot-multiple 4"),
    ],
)
def test_what_cannot_run_is_refused(topology, options, message):
    with pytest.raises(ConfigError, match=message):
        simulate(plan_of(**options), LLAMA, Topology(**topology))


def test_an_overlap_is_a_share():
    with pytest.raises(ConfigError, match=r"overlap is a share between 0 and 1, got 1\.5"):
        simulate(plan_of(), LLAMA, SHARDED, overlap=1.5)


def test_a_machine_whose_memory_is_not_known_has_no_estimate():
    plan = plan_of()
    assert simulate(plan, LLAMA.with_machine(memory=np.inf), SHARDED).memory is None
    assert memory_of(plan, cost=LLAMA.with_machine(memory=90e9)).limit == 90e9
