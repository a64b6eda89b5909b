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
    return _fill_slots(np.lexsort((-cp_degrees, -seconds)), cp_degrees, num_ranks)


def random_slots(cp_degrees: np.ndarray, num_ranks: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Packs of one width side by side in random order: (slot, rank0), both int64 [packs]."""
    order = rng.permutation(len(cp_degrees))
    return _fill_slots(order[np.argsort(-cp_degrees[order], kind="stable")], cp_degrees, num_ranks)


def _fill_slots(order: np.ndarray, cp_degrees: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Take packs in `order`, each into the first open slot with a free gang: (slot, rank0), both int64 [packs]."""
    slots, ranks = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
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
    slot_tokens: np.ndarray,
    slot_width: np.ndarray,
    step_tokens: int,
    rng: np.random.Generator,
    *,
    num_first_steps: int = 0,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle slots and cut them into steps of about `step_tokens`: (step, slot in the step), both int64 [slots].

    `slot_tokens` int64 [slots] are token slots. Slots of each `slot_width` (largest CP degree, int64 [slots]) are
    spread evenly over the epoch, each class in an order of its own. The first `num_first_steps` steps use the least
    width only (curriculum). Steps get whole blocks of `multiple` slots.
    """
    order = np.argsort(_even_times(slot_width, rng), kind="stable")
    if num_first_steps:
        narrow = order[slot_width[order] == slot_width.min()]
        prefix = narrow[np.cumsum(slot_tokens[narrow]) <= num_first_steps * step_tokens + slot_tokens[narrow] // 2]
        is_first = np.zeros(len(order), bool)
        is_first[prefix] = True
        order = np.concatenate([prefix, order[~is_first[order]]])
    block_start = np.arange(len(order)) // multiple * multiple
    ends = np.cumsum(slot_tokens[order])
    starts = ends - slot_tokens[order]
    block_end = ends[np.minimum(block_start + multiple, len(order)) - 1]
    middle = (starts[block_start] + block_end - 1) // 2
    step_in_order = np.unique(middle // step_tokens, return_inverse=True)[1]
    step, slot = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    step[order] = step_in_order
    slot[order] = np.arange(len(order)) - np.searchsorted(step_in_order, step_in_order)
    return step, slot


def _even_times(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A time in [0, 1) for each slot [n] such that each class is spread evenly and in random order."""
    times = np.empty(len(classes))
    for value in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == value))
        times[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return times
