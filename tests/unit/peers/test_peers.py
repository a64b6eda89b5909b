"""Every peer plans every sample exactly once, on sets that break planners."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from benchmarks.peers.balanced_cp import balanced_cp
from benchmarks.peers.flexsp import flexsp
from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.peers.common import least_degree, random_steps, static_degree
from megatron_hbp.planning.peers.default_dynamic import default_dynamic, micro_batch
from megatron_hbp.planning.peers.skrull import joined_packs, skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.peers.verl_kk import verl_kk

UNIT, RANKS = 1024, 8
COST = preset("llama3.1-8b-h100")
PEERS = {
    "static": static_cp,
    "balanced": balanced_cp,
    "balanced, as it runs": partial(balanced_cp, packed=False),
    "dynamic": default_dynamic,
    "flexsp": partial(flexsp, time_limit=0.3, num_buckets=4, trials=1),
    "skrull": skrull,
    "verl": verl_kk,
}


def mixed(num_samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.rint(60 * np.exp(rng.standard_normal(num_samples))), 1, UNIT)
    longs = rng.integers(UNIT, 8 * UNIT, max(1, num_samples // 50), endpoint=True)
    return rng.permutation(np.concatenate([lengths, longs])).astype(np.int64)


SETS = {
    "one short": np.array([7]),
    "one that takes all ranks": np.array([RANKS * UNIT]),
    "two": np.array([3 * UNIT, 1]),
    "all equal": np.full(50, 300),
    "all one rank": np.full(9, UNIT),
    "all longest": np.full(5, RANKS * UNIT),
    "boundaries": np.array([UNIT * c + d for c in (1, 2, 4) for d in (-1, 0, 1)] + [1] * 9),
    "all ones": np.ones(40, np.int64),
    "mixed": mixed(200, 0),
}


def plan(name: str, lengths: np.ndarray, **changes):
    return PEERS[name](
        lengths, **{"num_ranks": RANKS, "step_tokens": RANKS * UNIT, "unit": UNIT, "cost": COST, "seed": 0} | changes
    )


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("data", SETS)
def test_every_sample_runs_once_within_memory(name, data):
    lengths = SETS[data]
    made = plan(name, lengths)
    made.check()
    assert np.array_equal(np.sort(made.sample_ids), np.arange(len(lengths)))
    assert np.array_equal(made.lengths, lengths[made.sample_ids])
    assert (made.pack_tokens <= UNIT * made.pack_cp).all()
    assert not (made.pack_cp & (made.pack_cp - 1)).any()
    assert plan_metrics(made, COST).epoch_seconds > 0


@pytest.mark.parametrize("name", ["static", "dynamic", "flexsp", "skrull", "verl"])
def test_ranks_that_are_no_power_of_two(name):
    lengths = np.minimum(mixed(100, 1), 2 * UNIT)
    made = plan(name, lengths, num_ranks=6, step_tokens=6 * UNIT)
    assert np.array_equal(np.sort(made.sample_ids), np.arange(len(lengths)))


def test_balanced_refuses_what_the_wheel_cannot_fill():
    with pytest.raises(ConfigError, match="power of two"):
        plan("balanced", np.full(10, 50), num_ranks=6)


@pytest.mark.parametrize("name", PEERS)
def test_a_sample_beyond_all_ranks_is_an_error(name):
    with pytest.raises(DataError):
        plan(name, np.array([5, RANKS * UNIT + 1]))


@pytest.mark.parametrize("name", [name for name in PEERS if name != "flexsp"])
def test_the_seed_decides(name):
    lengths = mixed(300, 2)
    assert plan(name, lengths).hash == plan(name, lengths).hash
    assert plan(name, lengths).hash != plan(name, lengths, seed=1).hash


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
    cost = replace(COST, max_cp_degree=2)
    for lengths in (np.array([7]), np.array([2 * UNIT, 900, 900, 50]), mixed(200, 3) // 4 + 1):
        made = default_dynamic(lengths, num_ranks=RANKS, step_tokens=2 * RANKS * UNIT, unit=UNIT, cost=cost)
        assert made.pack_cp.max() == 2
        assert sorted(made.sample_ids) == list(range(len(lengths)))


def test_skrull_joins_local_packs_to_the_distributed_one():
    made = plan("skrull", np.array([4 * UNIT] * 2 + [100] * 40), step_tokens=2 * RANKS * UNIT)
    joined = joined_packs(made)
    assert joined.any()
    assert (made.pack_cp[joined] == 1).all()
    for pack in np.flatnonzero(joined):
        before = made.pack_at(made.pack_step[pack], made.pack_slot[pack] - 1, made.pack_rank0[pack])
        assert made.pack_cp[before] == 4


def test_static_takes_the_fastest_setting():
    lengths = mixed(2000, 5)
    wide, narrow = plan("static", lengths), plan("static", lengths, max_degree=8)
    assert plan_metrics(wide, COST).epoch_seconds <= plan_metrics(narrow, COST).epoch_seconds
