"""Peers that need more than numpy, their parts against plain definitions, and the measures of the comparison."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest

from benchmarks.peers.balanced_cp import balanced_cp
from benchmarks.peers.flexsp import buckets, cut_points, flexsp
from benchmarks.peers.measure import compare, eta_squared, joined_packs, lower_bound, wall_with_waits
from benchmarks.peers.plug_in import PLANNERS
from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning import Request, Samples, parse_tiers
from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.skrull import skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.request import Planner
from tests.unit.planning.peers.sets import (
    COST,
    RANKS,
    SETS,
    UNIT,
    check_every_sample_once_within_memory,
    mixed,
    plan_by,
)

PEERS: dict[str, Planner] = {
    "balanced": balanced_cp,
    "balanced, as it runs": partial(balanced_cp, packed=False),
    "flexsp": partial(flexsp, time_limit=0.3, num_buckets=4, trials=1),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("data", SETS)
def test_every_sample_runs_once_within_memory(name, data):
    check_every_sample_once_within_memory(PEERS[name], SETS[data])


def test_flexsp_on_ranks_that_are_no_power_of_two():
    lengths = np.minimum(mixed(100, 1), 2 * UNIT)
    made = plan_by(PEERS["flexsp"], lengths, num_ranks=6, step_tokens=6 * UNIT)
    assert np.array_equal(np.sort(made.sample_ids), np.arange(len(lengths)))


def test_balanced_refuses_what_the_wheel_cannot_fill():
    with pytest.raises(ConfigError, match="power of two"):
        plan_by(balanced_cp, np.full(10, 50), num_ranks=6)


@pytest.mark.parametrize("name", PEERS)
def test_a_sample_beyond_all_ranks_is_an_error(name):
    with pytest.raises(DataError):
        plan_by(PEERS[name], np.array([5, RANKS * UNIT + 1]))


@pytest.mark.parametrize("name", ["balanced", "balanced, as it runs"])
def test_the_seed_decides(name):
    lengths = mixed(300, 2)
    assert plan_by(PEERS[name], lengths).hash == plan_by(PEERS[name], lengths).hash
    assert plan_by(PEERS[name], lengths).hash != plan_by(PEERS[name], lengths, seed=1).hash


def test_skrull_joins_local_packs_to_the_distributed_one():
    made = plan_by(skrull, np.array([4 * UNIT] * 2 + [100] * 40), step_tokens=2 * RANKS * UNIT)
    joined = joined_packs(made)
    assert joined.any()
    assert (made.pack_cp[joined] == 1).all()
    for pack in np.flatnonzero(joined):
        before = made.pack_at(made.pack_step[pack], made.pack_slot[pack] - 1, made.pack_rank0[pack])
        assert made.pack_cp[before] == 4


def test_buckets_round_up_by_least():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 30, rng.integers(1, 12))
        values = np.unique(sizes)
        expected = min(3, len(values))
        least = min(
            sum(values[ends][np.searchsorted(values[ends], size)] - size for size in sizes)
            for cut in combinations(range(len(values) - 1), expected - 1)
            for ends in [[*cut, len(values) - 1]]
        )
        bucket_of = buckets(sizes, 3)
        uppers = np.array([sizes[bucket_of == bucket].max() for bucket in range(bucket_of.max() + 1)])
        assert len(uppers) <= 3
        assert (uppers[bucket_of] - sizes).sum() == least


def test_cuts_leave_no_run_empty():
    rng = np.random.default_rng(1)
    for _ in range(100):
        sizes = np.sort(rng.integers(1, 1000, rng.integers(1, 20)))[::-1]
        for count in range(1, len(sizes) + 1):
            assert all(len(run) for run in np.split(sizes, cut_points(sizes, count)))


def test_lower_bound_against_a_loop():
    lengths = np.array([1, 100, 16384, 16385, 40000, 131072])
    total = 0.0
    for length in lengths.tolist():
        options = []
        for local, layers in COST.recompute_layers:
            degree = 1
            while local * degree < length:
                degree *= 2
            text = f"{local * degree}:cp{degree}" + (f":full{layers}" if layers else "")
            tier = COST.tier_cost(parse_tiers(text)[0])
            seconds = tier.per_token * length + tier.per_square * length**2
            options.append(degree * seconds + tier.fixed * length / local)
        total += min(options)
    bound = lower_bound(lengths, COST, num_ranks=32, unit=16384, step_tokens=524288)
    assert bound == pytest.approx(total / 32, rel=1e-12)


@pytest.mark.parametrize("peer", [default_dynamic, skrull, static_cp])
def test_no_plan_beats_the_bound_and_waits_cost_time(peer):
    lengths = np.random.default_rng(2).integers(1, 60000, 400)
    plan = plan_by(peer, lengths, step_tokens=8 * 16384, unit=16384)
    row = compare(plan, COST, 16384, 0.0)
    assert 1 <= row.over_bound <= row.over_bound_with_waits + 1e-9
    assert 0 <= row.idle < 1
    assert abs(row.idle - row.metrics.idle) < 1e-9


def test_waits_of_a_gang_by_hand():
    plan = plan_by(skrull, np.array([16384, 20000, 16000]), num_ranks=2, step_tokens=10**6, unit=16384)
    seconds = np.arange(1.0, plan.num_packs + 1)
    free = np.zeros(2)
    for pack in range(plan.num_packs):
        ranks = slice(plan.pack_rank0[pack], plan.pack_rank0[pack] + plan.pack_cp[pack])
        free[ranks] = free[ranks].max() + seconds[pack]
    assert wall_with_waits(plan, seconds) == free.max()


def test_eta_squared_tells_random_from_sorted():
    lengths = np.exp(np.random.default_rng(3).normal(6, 1, 20000)).astype(np.int64) + 1
    plan = plan_by(default_dynamic, lengths, step_tokens=8 * 16384, unit=16384)
    assert abs(eta_squared(plan)) < 0.01


def test_the_plug_in_answers_requests():
    lengths = np.random.default_rng(4).integers(1, 40000, 60)
    request = Request(
        tiers=parse_tiers("16384:cp1:full28,131072:cp8:full28"), num_ranks=8, step_tokens=131072, cost=COST
    )
    for planner in PLANNERS.values():
        assert np.array_equal(np.sort(planner(Samples.of(lengths), request).sample_ids), np.arange(60))
