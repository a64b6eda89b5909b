"""What must hold for every plan, on thousands of random cases."""

from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import planning_cases

from megatron_hbp.planning import make_plan
from megatron_hbp.planning.cost.model import PRESETS
from megatron_hbp.planning.measure.metrics import plan_metrics

COST = PRESETS["llama3.1-8b-h100"]
assert_close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


@settings(max_examples=600, deadline=None)
@given(planning_cases())
def test_every_sample_once_and_no_pack_too_full(case):
    plan = make_plan(**case)
    plan.check()
    assert sorted(plan.sample_ids.tolist()) == list(range(len(case["lengths"])))
    np.testing.assert_array_equal(plan.lengths, case["lengths"][plan.sample_ids])
    assert (plan.pack_tokens <= plan.pack_capacity).all()


@settings(max_examples=300, deadline=None)
@given(planning_cases(), st.sampled_from([1, 3, 20]))
def test_loss_tokens_move_samples_but_no_packs(case, one_in):
    lengths = case["lengths"]
    blind, aware = make_plan(**case), make_plan(**case, loss_tokens=np.maximum(1, lengths // (1 + lengths % one_in)))
    aware.check()
    assert sorted(aware.sample_ids.tolist()) == list(range(len(lengths)))
    assert (aware.pack_tokens <= aware.pack_capacity).all()
    for column in ("pack_tier", "pack_step", "pack_slot", "pack_rank0", "num_micro_batches"):
        np.testing.assert_array_equal(getattr(aware, column), getattr(blind, column))


@settings(max_examples=300, deadline=None)
@given(planning_cases())
def test_lockstep_gives_every_rank_the_same_slots(case):
    plan = make_plan(**case)
    busy = plan.grid.max(axis=2) >= 0
    used = np.arange(plan.max_micro_batches) < plan.num_micro_batches[:, None]
    np.testing.assert_array_equal(busy, used)  # no slot is empty, none lies beyond the count
    dummies = int((plan.grid[used] < 0).sum())
    assert plan.counts["dummies"] == dummies


@settings(max_examples=300, deadline=None)
@given(planning_cases(max_samples=40))
def test_metrics_equal_brute_force(case):
    plan = make_plan(**case)
    token_rows, square_rows, second_rows = [], [], []
    for step in range(plan.num_steps):
        for slot in range(plan.num_micro_batches[step]):
            tokens, squares, seconds = (np.zeros(plan.num_ranks) for _ in range(3))
            for rank in range(plan.num_ranks):
                index = plan.pack_at(step, slot, rank)
                if index < 0:
                    continue
                pack = plan.pack(index)
                tier = plan.tiers[pack.tier]
                lengths = [int(length) for length in pack.lengths]
                tokens[rank] = sum(lengths) / tier.cp_degree
                squares[rank] = sum(length**2 for length in lengths) / tier.cp_degree
                cost = COST.tier_cost(tier)
                squared = sum(length**2 for length in lengths)
                seconds[rank] = cost.fixed + cost.per_token * sum(lengths) + cost.per_square * squared
            token_rows.append(tokens)
            square_rows.append(squares)
            second_rows.append(seconds)
    found = plan_metrics(plan, COST)
    total = case["lengths"].sum()
    assert_close(found.dbr, np.mean([(row.max() - row).mean() / row.max() for row in token_rows]))
    assert_close(found.abr, np.mean([(row.max() - row).mean() / row.max() for row in square_rows]))
    assert_close(found.ave_t, np.mean(token_rows))
    wall = sum(row.max() for row in second_rows)
    assert_close(found.epoch_seconds, wall)
    assert_close(found.idle, 1 - sum(row.sum() for row in second_rows) / (wall * plan.num_ranks))
    packs = [plan.pack(index) for index in range(plan.num_packs)]
    slots = sum(plan.tiers[pack.tier].packing_length for pack in packs)
    assert_close(found.pr, 1 - total / slots)
    shared = sum(pack.num_tokens for pack in packs if plan.tiers[pack.tier].cp_degree > 1)
    assert_close(found.cr, shared / total)


@settings(max_examples=200, deadline=None)
@given(planning_cases(max_samples=60))
def test_gang_plans_hold_every_sample_once(case):
    plan = make_plan(**case, schedule="gang")
    plan.check()
    assert sorted(plan.sample_ids.tolist()) == list(range(len(case["lengths"])))
    assert (plan.grid.reshape(plan.num_steps, -1).max(axis=1) >= 0).all()  # no step is empty
