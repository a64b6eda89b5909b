"""Balance batching (paper, algorithm 7) and what turns slots into steps.

A *slot* is one micro-batch position over all ranks. In lockstep it is a barrier, so packs that cost the same must run
side by side: sort packs by modelled time, cut the sorted list into slots, then shuffle the slots.
"""

import numpy as np


def balanced_slots(seconds: np.ndarray, cp_degrees: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Put packs of like cost side by side: (slot, rank0), both int64 [packs].

    `seconds` [packs] is the modelled time, `cp_degrees` int64 [packs] the width. Packs are taken from the costliest
    down; each goes to the first open slot with an aligned free gang, so that a hole left by wide packs is filled by the
    next narrower ones.
    """
    slots, ranks = np.empty(len(seconds), np.int64), np.empty(len(seconds), np.int64)
    order = np.lexsort((-cp_degrees, -seconds))
    widths = cp_degrees[order]
    run_ends = _run_ends(widths)
    open_slots: dict[int, np.ndarray] = {}
    num_slots = position = 0
    while position < len(order):
        width = int(widths[position])
        gangs = num_ranks // width
        whole = (run_ends[position] - position) // gangs * gangs
        if whole and not open_slots:  # whole slots of one width: no search
            packs, index = order[position : position + whole], np.arange(whole)
            slots[packs], ranks[packs] = num_slots + index // gangs, index % gangs * width
            num_slots += whole // gangs
            position += whole
            continue
        pack = order[position]
        position += 1
        slot, rank0 = next(((s, r) for s, free in open_slots.items() if (r := _free_gang(free, width)) >= 0), (-1, 0))
        if slot < 0:
            slot = num_slots
            num_slots += 1
            open_slots[slot] = np.full(num_ranks, True)
        slots[pack], ranks[pack] = slot, rank0
        open_slots[slot][rank0 : rank0 + width] = False
        if not open_slots[slot].any():
            del open_slots[slot]
    return slots, ranks


def _run_ends(values: np.ndarray) -> np.ndarray:
    """Where the run of equal values around each position ends, int64 [n]."""
    changes = np.append(np.flatnonzero(np.diff(values)) + 1, len(values))
    return np.repeat(changes, np.diff(changes, prepend=0))


def _free_gang(free: np.ndarray, width: int) -> int:
    """First rank of an aligned free gang of `width` ranks, or -1. `free` bool [ranks]."""
    gangs = free[: len(free) // width * width].reshape(-1, width).all(axis=1)
    first = int(gangs.argmax())
    return first * width if gangs[first] else -1


def steps_of_slots(
    slot_tokens: np.ndarray, step_tokens: int, rng: np.random.Generator, first: np.ndarray | None = None,
    num_first_steps: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Shuffle slots and cut them into steps of about `step_tokens`: (step, slot in the step), both int64 [slots].

    `slot_tokens` int64 [slots] are token slots. For a curriculum, `first` bool [slots] says which slots may run in the
    first `num_first_steps` steps.
    """
    order = rng.permutation(len(slot_tokens))
    if first is not None and num_first_steps:
        wanted = num_first_steps * step_tokens
        eligible = order[first[order]]
        prefix = eligible[np.cumsum(slot_tokens[eligible]) <= wanted + slot_tokens[eligible] // 2]
        order = np.concatenate([prefix, order[~np.isin(order, prefix)]])
    tokens = slot_tokens[order]
    middle = np.cumsum(tokens) - (tokens + 1) // 2
    step_in_order = np.unique(middle // step_tokens, return_inverse=True)[1]
    step, slot = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    step[order] = step_in_order
    starts = np.searchsorted(step_in_order, step_in_order)
    slot[order] = np.arange(len(order)) - starts
    return step, slot

