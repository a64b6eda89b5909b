"""The paper's measures by hand; against brute force in tests/property."""

import numpy as np
import pytest

from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from tests.unit.planning.plans import plan_of

LLAMA = preset("llama3.1-8b-h100")


def test_slots_of_dummies_take_time():
    lengths = np.full(64, 1024)
    plan = plan_of(lengths, "1024:cp1", num_ranks=8, step_tokens=8192)
    padded = plan_of(lengths, "1024:cp1", num_ranks=8, step_tokens=8 * 8192, slot_multiple=10)
    assert (plan.num_micro_batches.sum(), padded.num_micro_batches.sum()) == (8, 10)
    more = plan_metrics(padded, LLAMA).epoch_seconds - plan_metrics(plan, LLAMA).epoch_seconds
    assert more == pytest.approx(2 * LLAMA.micro_batch_seconds)


def test_two_ranks_by_hand():
    """One slot: 1,000 tokens in one sample beside 600 in two, in packs of 1,024."""
    plan = plan_of([1000, 500, 100], "1024:cp1", num_ranks=2, step_tokens=2048)
    assert plan.num_packs == 2
    found = plan_metrics(plan, LLAMA)
    assert found.dbr == pytest.approx((0 + 400 / 1000) / 2)
    assert found.abr == pytest.approx((0 + 1 - (500**2 + 100**2) / 1000**2) / 2)
    assert found.pr == pytest.approx(1 - 1600 / 2048)
    assert found.ave_t == 800
    assert found.cr == found.forced_cr == 0
