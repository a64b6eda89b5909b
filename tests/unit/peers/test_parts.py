"""Karmarkar-Karp, FlexSP's buckets and cuts, and the measures, against plain definitions."""

from itertools import combinations

import numpy as np
import pytest

from benchmarks.peers.flexsp import buckets, cut_points
from benchmarks.peers.measure import compare, eta_squared, lower_bound, wall_with_waits
from benchmarks.peers.plug_in import PLANNERS
from megatron_hbp.planning.core.plan import DataFingerprint
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.differencing import karmarkar_karp
from megatron_hbp.planning.peers.skrull import skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.schedule.placement import Request

COST = preset("llama3.1-8b-h100")


def test_karmarkar_karp_on_the_textbook_example():
    costs = np.array([8.0, 7, 6, 5, 4])
    sums = np.bincount(karmarkar_karp(costs, 2), costs)
    assert sorted(sums.tolist()) == [14, 16]  # differencing gives a difference of 2 here, 0 is possible


@pytest.mark.parametrize("num_bins", [1, 2, 5, 9])
@pytest.mark.parametrize("num_items", [0, 1, 4, 200])
def test_karmarkar_karp_balances_sums_and_counts(num_bins, num_items):
    costs = np.random.default_rng(num_items).lognormal(size=num_items)
    for equal_counts in (False, True):
        bin_of = karmarkar_karp(costs, num_bins, equal_counts=equal_counts)
        assert bin_of.shape == (num_items,)
        assert num_items == 0 or 0 <= bin_of.min() <= bin_of.max() < num_bins
        counts = np.bincount(bin_of, minlength=num_bins)
        if equal_counts:
            assert counts.max() - counts.min() <= 1
        if num_items == 200:
            sums = np.bincount(bin_of, costs, num_bins)
            dealt = np.bincount(np.argsort(np.argsort(-costs)) % num_bins, costs, num_bins)
            # Equal counts bind the largest item to as many others as every bin has: compare with plain dealing.
            assert sums.max() <= (dealt.max() if equal_counts else 1.01 * max(sums.mean(), costs.max()))


def test_buckets_round_up_by_least():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 30, rng.integers(1, 12))
        values = np.unique(sizes)
        wanted = min(3, len(values))
        least = min(
            sum(values[ends][np.searchsorted(values[ends], size)] - size for size in sizes)
            for cut in combinations(range(len(values) - 1), wanted - 1)
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
    plan = peer(lengths, num_ranks=8, step_tokens=8 * 16384, unit=16384, cost=COST, seed=0)
    row = compare(plan, COST, 16384, 0.0)
    assert 1 <= row.over_bound <= row.over_bound_with_waits + 1e-9
    assert 0 <= row.idle < 1
    assert abs(row.idle - row.metrics.idle) < 1e-9


def test_waits_of_a_gang_by_hand():
    lengths = np.array([16384, 20000, 16000])
    plan = skrull(lengths, num_ranks=2, step_tokens=10**6, unit=16384, cost=COST, seed=0)
    seconds = np.arange(1.0, plan.num_packs + 1)
    free = np.zeros(2)
    for pack in range(plan.num_packs):
        ranks = slice(plan.pack_rank0[pack], plan.pack_rank0[pack] + plan.pack_cp[pack])
        free[ranks] = free[ranks].max() + seconds[pack]
    assert wall_with_waits(plan, seconds) == free.max()


def test_eta_squared_tells_random_from_sorted():
    lengths = np.exp(np.random.default_rng(3).normal(6, 1, 20000)).astype(np.int64) + 1
    plan = default_dynamic(lengths, num_ranks=8, step_tokens=8 * 16384, unit=16384, cost=COST, seed=0)
    assert abs(eta_squared(plan)) < 0.01


def test_the_plug_in_answers_requests():
    lengths = np.random.default_rng(4).integers(1, 40000, 60)
    request = Request(
        tiers=parse_tiers("16384:cp1:full28,131072:cp8:full28"), num_ranks=8, step_tokens=131072, seed=0,
        schedule="lockstep", cost=COST, data=DataFingerprint.of(lengths),
    )  # fmt: skip
    for planner in PLANNERS.values():
        assert np.array_equal(np.sort(planner(lengths, request).sample_ids), np.arange(60))
