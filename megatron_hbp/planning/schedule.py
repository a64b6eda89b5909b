"""Balance batching (paper, algorithm 7) and what turns slots into steps.

A *slot* is one micro-batch position over all ranks. In lockstep it is a barrier, so packs that cost the same must run
side by side: sort packs by modelled time, cut the sorted list into slots, then shuffle the slots.
"""

import numpy as np


def balanced_slots(
    seconds: np.ndarray, cp_degrees: np.ndarray, num_ranks: int, loss: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Put packs of like cost side by side: (slot, rank0), both int64 [packs].

    `seconds` [packs] is the modelled time, `cp_degrees` int64 [packs] the width. Packs are taken from the costliest
    down; each goes to the first open slot with an aligned free gang, so that a hole left by wide packs is filled by the
    next narrower ones. With `loss` [packs], supervised tokens on a rank, packs of nearly equal cost are first put in
    an order that gives slots equal sums of it.
    """
    order = np.lexsort((-cp_degrees, -seconds))
    if loss is not None:
        order = even_out(order, seconds, loss, cp_degrees, num_ranks)
    return _fill_slots(order, cp_degrees, num_ranks)


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


WINDOW_SLOTS, WINDOW_SPREAD = 16, 2e-4
"""Packs are exchanged among this many slots at most, and only where their times differ by less than this share."""


def even_out(
    order: np.ndarray, seconds: np.ndarray, loss: np.ndarray, cp_degrees: np.ndarray, num_ranks: int
) -> np.ndarray:
    """Reorder packs of one width and like time so that slots get equal loss tokens: order int64 [packs].

    In a window of whole slots, the packs with most loss tokens are dealt to slots back and forth.
    """
    order = order.copy()
    ends = _run_ends(cp_degrees[order])
    position = 0
    while position < len(order):
        gangs = num_ranks // int(cp_degrees[order[position]])
        alike = seconds[order[position : ends[position]]] >= seconds[order[position]] * (1 - WINDOW_SPREAD)
        slots = min(int(alike.argmin() if not alike.all() else len(alike)) // gangs, WINDOW_SLOTS)
        size = slots * gangs
        if gangs > 1 and slots > 1:
            window = order[position : position + size]
            ranked = window[np.argsort(-loss[window], kind="stable")].reshape(gangs, slots)
            ranked[1::2] = ranked[1::2, ::-1]
            order[position : position + size] = ranked.T.reshape(-1)
        position += max(size, gangs)
    return order


def steps_of_slots(
    slot_tokens: np.ndarray,
    slot_width: np.ndarray,
    step_tokens: int,
    rng: np.random.Generator,
    *,
    slot_loss: np.ndarray | None = None,
    num_first_steps: int = 0,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle slots and cut them into steps of about `step_tokens`: (step, slot in the step), both int64 [slots].

    `slot_tokens` int64 [slots] are token slots. Slots of each `slot_width` (largest CP degree, int64 [slots]) are
    spread evenly over the epoch, each class in an order of its own; with `slot_loss` [slots], supervised tokens, so
    that steps get equal sums of it. The first `num_first_steps` steps use the least
    width only (curriculum). Steps get whole blocks of `multiple` slots.
    """
    num_steps = max(1, round(int(slot_tokens.sum()) / step_tokens))
    order = np.argsort(_even_times(slot_width, rng, slot_loss, num_steps), kind="stable")
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


def _even_times(classes: np.ndarray, rng: np.random.Generator, loss: np.ndarray | None, num_steps: int) -> np.ndarray:
    """A time in [0, 1) for each slot [n] such that each class is spread evenly and in random order.

    With `loss`, slots of a class are dealt to `num_steps` parts of the epoch back and forth, those with most first.
    """
    times = np.empty(len(classes))
    for value in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == value))
        rows = len(members) // num_steps if loss is not None else 0
        if loss is not None and rows > 1:
            dealt, members = members[: rows * num_steps], members[rows * num_steps :]
            ranked = dealt[np.argsort(-loss[dealt], kind="stable")].reshape(rows, num_steps)
            ranked[1::2] = ranked[1::2, ::-1]
            times[ranked] = (rng.permutation(num_steps) + rng.random(ranked.shape)) / num_steps
        times[members] = (np.arange(len(members)) + rng.random(len(members))) / max(len(members), 1)
    return times
