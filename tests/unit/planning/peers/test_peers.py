"""Every peer plans every sample exactly once, on sets that break planners."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hbp.errors import DataError
from megatron_hbp.planning import Request, Samples, parse_tiers
from megatron_hbp.planning.cost.file import from_json
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.peers import PEERS
from megatron_hbp.planning.peers.common import cost_of, least_degree, random_steps, static_degree
from megatron_hbp.planning.peers.default_dynamic import default_dynamic, micro_batch
from megatron_hbp.planning.peers.static_cp import static_cp
from tests.unit.planning.peers.sets import (
    COST,
    RANKS,
    SETS,
    UNIT,
    check_every_sample_once_within_memory,
    mixed,
    plan_by,
)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("data", SETS)
def test_every_sample_runs_once_within_memory(name, data):
    check_every_sample_once_within_memory(PEERS[name], SETS[data])
    assert plan_metrics(plan_by(PEERS[name], SETS[data]), COST).epoch_seconds > 0


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("schedule", ["lockstep", "gang"])
def test_peers_answer_any_request(name, schedule):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 1000, 900), rng.integers(1025, 8192, 40)])
    request = Request(
        tiers=parse_tiers("1024:cp1,2048:cp2,8192:cp8"), num_ranks=8, step_tokens=16384, schedule=schedule, cost=COST
    )
    plan = PEERS[name](Samples.of(lengths), request)
    plan.check()
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("name", PEERS)
def test_ranks_that_are_no_power_of_two(name):
    lengths = np.minimum(mixed(100, 1), 2 * UNIT)
    made = plan_by(PEERS[name], lengths, num_ranks=6, step_tokens=6 * UNIT)
    assert np.array_equal(np.sort(made.sample_ids), np.arange(len(lengths)))


@pytest.mark.parametrize("name", PEERS)
def test_a_sample_beyond_all_ranks_is_an_error(name):
    with pytest.raises(DataError):
        plan_by(PEERS[name], np.array([5, RANKS * UNIT + 1]))


@pytest.mark.parametrize("name", PEERS)
def test_the_seed_decides(name):
    lengths = mixed(300, 2)
    assert plan_by(PEERS[name], lengths).hash == plan_by(PEERS[name], lengths).hash
    assert plan_by(PEERS[name], lengths).hash != plan_by(PEERS[name], lengths, seed=1).hash


@pytest.mark.parametrize("name", PEERS)
def test_where_memory_is_not_known_peers_recompute_as_the_shortest_tier_does(name):
    unknown = replace(COST, recompute_layers=())
    request = Request(tiers=parse_tiers("1024:cp1:full5"), num_ranks=8, step_tokens=8192, cost=unknown)
    plan = PEERS[name](Samples.of(mixed(50, 0)), request)
    assert {tier.recompute.num_layers for tier in plan.tiers} == {5}
    assert from_json(plan.cost, "", "") == cost_of(request) == replace(unknown, recompute_layers=((1024, 5),))


def test_random_steps_hold_about_what_was_asked_for():
    lengths = mixed(5000, 3)
    steps = random_steps(lengths, 20 * UNIT, 0)
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(len(lengths)))
    tokens = np.array([lengths[ids].sum() for ids in steps])
    assert abs(tokens.mean() / (20 * UNIT) - 1) < 0.05
    assert np.abs(tokens - tokens.mean()).max() <= 8 * UNIT


def test_degrees_at_their_boundaries():
    lengths = np.array([1, UNIT, UNIT + 1, 2 * UNIT, 2 * UNIT + 1, 8 * UNIT])
    assert least_degree(lengths, UNIT, 8).tolist() == [1, 1, 2, 2, 4, 8]
    assert static_degree(np.array([3 * UNIT]), UNIT, 12) == 4


def test_dynamic_micro_batches_leave_no_rank_empty():
    rng = np.random.default_rng(4)
    for _ in range(50):
        sizes = sorted(rng.integers(1, 4 * UNIT, rng.integers(1, 60)).tolist(), reverse=True)
        gangs, left = micro_batch(sizes, least_degree(np.array(sizes), UNIT, RANKS).tolist(), RANKS, UNIT, RANKS)
        assert sum(gang.degree for gang in gangs) == RANKS
        ids = [sample for gang in gangs for sample in gang.ids]
        assert sorted(ids + left) == list(range(len(sizes)))
        assert 0 in ids
        for gang in gangs:
            assert sum(sizes[sample] for sample in gang.ids) <= UNIT * gang.degree


def test_dynamic_gangs_end_at_the_heads():
    ((count, layer),) = COST.model.layers
    two_heads = replace(layer, attention=replace(layer.attention, num_query_heads=2, num_kv_heads=2))
    cost = replace(COST, model=replace(COST.model, layers=((count, two_heads),)))
    for lengths in (np.array([7]), np.array([2 * UNIT, 900, 900, 50]), mixed(200, 3) // 4 + 1):
        made = plan_by(default_dynamic, lengths, cost=cost, step_tokens=2 * RANKS * UNIT)
        assert made.pack_cp.max() == 2
        assert sorted(made.sample_ids) == list(range(len(lengths)))


def test_static_takes_the_fastest_setting():
    lengths = mixed(2000, 5)
    wide = plan_by(static_cp, lengths)
    narrow = plan_by(lambda samples, request: static_cp(samples, request, max_degree=8), lengths)
    assert plan_metrics(wide, COST).epoch_seconds <= plan_metrics(narrow, COST).epoch_seconds
