"""The fit of a profile: planted constants come back, nothing is negative."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost.fit import fit_profile, nonnegative_least_squares, spearman
from megatron_hbp.planning.cost.profile_memory import layers_by_local_tokens
from megatron_hbp.profiling.grid import parse_policies, settings
from tests.unit.planning.profiles import HEADER, PLANTED, row_of, table_of

POLICIES = parse_policies("none,full2,full4,sel=core_attn", 4)
GRID = settings((1024, 4096, 16384, 65536), (1, 2, 4, 8), POLICIES, unit=1)


def test_planted_constants_come_back_exactly():
    found = fit_profile(table_of([row_of(s) for s in GRID]), name="x").cost
    for name in ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth"):
        assert getattr(found.machine, name) == pytest.approx(getattr(PLANTED.machine, name), rel=1e-6), name
    assert found.micro_batch_seconds == pytest.approx(PLANTED.micro_batch_seconds, rel=1e-6)
    assert (found.model, found.machine.name, found.machine.node_size) == (PLANTED.model, "CPU", 4)
    shares = {name: shares for name, *shares in found.recompute_shares}
    assert shares["full"] == pytest.approx([0.9, 0.95], rel=1e-6)
    assert shares["core_attn"] == pytest.approx([0.0, 1.1], abs=1e-6)
    assert dict(found.recompute_seconds) == pytest.approx(dict(PLANTED.recompute_seconds), rel=1e-6)
    assert found.tier_cost(parse_tiers("1024:cp1:full2")[0]).fixed == pytest.approx(0.02 + 0.008 / 2)


def test_with_noise_the_rows_held_out_are_predicted_within_it():
    rows = [row_of(setting, noise=0.05, seed=i) for i, setting in enumerate(GRID)]
    fit = fit_profile(table_of(rows), name="x")
    fitted, held_out = (np.median(fit.absolute_errors(held_out=held_out)) for held_out in (False, True))
    assert fitted < held_out < 0.06
    assert fit.cost.machine.linear_rate == pytest.approx(PLANTED.machine.linear_rate, rel=0.2)
    for tier in parse_tiers("8192:cp1,32768:cp4:full3"):  # neither length nor policy was in the table
        tokens = tier.packing_length
        expected = PLANTED.tier_cost(tier).seconds(tokens, tokens**2)
        assert fit.cost.tier_cost(tier).seconds(tokens, tokens**2) == pytest.approx(expected, rel=0.06)


def test_every_row_enters_the_fit_and_none_its_own_held_out_error():
    rows = [row_of(setting, noise=0.05, seed=i) for i, setting in enumerate(GRID)]
    before = {one.row.setting: one for one in fit_profile(table_of(rows), name="x").errors}
    for i, row in enumerate(rows):
        assert row.seconds is not None
        slower = replace(row, seconds=row.seconds * (1 + 1e-6))
        fit = fit_profile(table_of([*rows[:i], slower, *rows[i + 1 :]]), name="x")
        (after,) = (one for one in fit.errors if one.row.setting == row.setting)
        assert after.predicted > before[row.setting].predicted
        assert after.unseen == before[row.setting].unseen


def test_no_coefficient_is_negative():
    rows = [replace(row_of(s), seconds=1.0 / s.tokens) for s in GRID]  # the longer, the faster
    cost = fit_profile(table_of(rows), name="x").cost
    for tier in parse_tiers("1024:cp1,4096:cp2:full4,8192:cp4:sel=core_attn"):
        one = cost.tier_cost(tier)
        assert min(one.fixed, one.per_token, one.per_square) >= 0


def test_least_squares_against_all_sets_of_free_columns():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = random.standard_normal((8, 4)), random.standard_normal(8)
        found = nonnegative_least_squares(a, b)
        best = np.inf
        for mask in range(16):
            free = [i for i in range(4) if mask >> i & 1]
            x = np.zeros(4)
            if free:
                x[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(a @ x - b)))
        assert (found >= 0).all() and np.linalg.norm(a @ found - b) == pytest.approx(best)


def test_too_few_rows_are_refused_and_rows_that_do_not_fit_do_not_count():
    rows = [row_of(s) for s in GRID[:4]]
    rows += [replace(row_of(s), fits=False, seconds=None) for s in GRID[4:]]
    with pytest.raises(DataError, match=r"cannot determine \d+ constants: profile more lengths"):
        fit_profile(table_of(rows), name="x")


def test_rank_correlation():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 25, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(0.8660254)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


@pytest.mark.parametrize("exchange", ["a2a", "all_gather", "p2p"])
def test_a_profile_is_fitted_by_the_exchange_that_ran(exchange):
    rows = []
    for setting in GRID:
        tier = replace(setting.tier, exchange=exchange)
        seconds = float(PLANTED.tier_cost(tier).seconds(setting.tokens, setting.squares))
        rows.append(replace(row_of(setting), seconds=seconds))
    table = replace(table_of(rows), header=replace(HEADER, exchange=exchange))
    assert max(abs(each.error) for each in fit_profile(table, name="x").errors) < 1e-9


def test_the_cost_model_knows_what_must_be_recomputed():
    table = table_of([row_of(s) for s in GRID if s.cp_degree == 1], limit=4096 * 500.0)
    assert layers_by_local_tokens(table) == ((1024, 0), (4096, 3))
    cost = fit_profile(table, name="x").cost
    assert cost.with_recompute(parse_tiers("4096:cp1")[0]).recompute.num_layers == 3
    assert layers_by_local_tokens(replace(table, memory_limit=None)) == ()


def test_ranks_of_two_gpus_are_fitted_as_such():
    """Rates and links are those of one GPU; a node of two ranks holds four. Four heads of a rank end at CP 4."""
    twice = replace(PLANTED, tensor_parallel=2)
    header = replace(HEADER, layout=HEADER.layout | {"tensor_parallel": 2, "world": 8, "node_size": 2})
    rows = [row_of(setting, twice) for setting in GRID if setting.cp_degree <= 4]
    found = fit_profile(replace(table_of(rows), header=header), name="x").cost
    assert (found.tensor_parallel, found.machine.node_size) == (2, 4)
    for name in ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth"):
        assert getattr(found.machine, name) == pytest.approx(getattr(PLANTED.machine, name), rel=1e-6), name


def test_the_limit_of_a_profile_is_the_memory_of_its_cost_model():
    found = fit_profile(table_of([row_of(s) for s in GRID], limit=5e9), name="x").cost
    assert (found.machine.memory, found.machine.memory_reserve) == (5e9, 0)
    assert fit_profile(table_of([row_of(s) for s in GRID]), name="x").cost.machine.memory == np.inf
