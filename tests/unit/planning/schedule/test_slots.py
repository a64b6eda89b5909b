"""Slots of like cost, steps of the size asked for."""

import numpy as np

from megatron_hbp.planning.schedule.slots import balanced_slots, steps_of_slots

RNG = np.random.default_rng(0)


def test_packs_of_like_time_run_side_by_side():
    seconds, widths = RNG.random(64), np.repeat([4, 2, 1], [4, 8, 52])
    slot, rank0 = balanced_slots(seconds, widths, 8)
    taken = {(s, rank) for s, r, w in zip(slot, rank0, widths, strict=True) for rank in range(r, r + w)}
    assert len(taken) == widths.sum()
    narrow = np.sort(seconds[widths == 1])
    spread = [np.ptp(seconds[slot == s]) for s in np.unique(slot)]
    assert np.mean(spread) < np.ptp(narrow) / 3


def test_steps_hold_what_was_asked_for():
    step, slot = steps_of_slots(np.full(40, 1024), np.ones(40, int), 4096, RNG)
    assert np.bincount(step).tolist() == [4] * 10
    assert sorted(zip(step.tolist(), slot.tolist(), strict=True)) == [(i // 4, i % 4) for i in range(40)]


def test_tier_ratio_is_even_over_time():
    width = np.repeat([1, 8], [300, 100])
    step, _ = steps_of_slots(np.full(400, 10), width, 80, np.random.default_rng(2))
    wide_per_step = np.bincount(step[width == 8], minlength=50)
    assert wide_per_step.min() >= 1 and wide_per_step.max() <= 3  # two on average
