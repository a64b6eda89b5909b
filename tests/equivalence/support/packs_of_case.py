"""Packs of a case: two steps of eight samples, in slots and gangs as the case's CP degrees and packs say."""

from tests.equivalence.support.factors import Case

NUM_STEPS = 2
LENGTHS = [17, 1, 40, 23, 5, 1, 60, 33, 9, 1, 31, 2, 1, 25, 50, 14]
"""Eight samples a step, two of them of one token."""
PER_STEP = len(LENGTHS) // NUM_STEPS
MIXED = {
    2: ((2,), (1, 1), (1,)),
    4: ((4,), (2, 1, 1), (1,)),
    6: ((6,), (3, 1, 2), (1,)),
    8: ((8,), (4, 2, 1, 1), (1,)),
}
"""Data-parallel ranks -> degrees of the gangs, side by side, of the slots in turn; the last leaves ranks idle."""
SAMPLES = {"ragged": (3, 1, 2), "one-token": (2,), "one sample": (1,), "padding": (2, 1)}
"""How many samples the packs take, in turn."""
Slot = list[tuple[int, int, list[int]]]
"""(first rank, CP degree, samples) of each pack."""


def gangs_of(case: Case) -> tuple[tuple[int, ...], ...]:
    """Degrees of the gangs of the slots in turn."""
    dp = case.data_parallel
    return MIXED[dp] if case.cp == "mixed" else ((int(case.cp),) * (dp // int(case.cp)),)


def degrees_of(case: Case) -> list[int]:
    """The CP degrees, ascending; those of the tiers."""
    return sorted({c for gangs in gangs_of(case) for c in gangs})


def packs_of(case: Case) -> list[tuple[int, int, int, int, list[int]]]:
    """(step, slot, first rank, tier, samples) of each pack."""
    tiers = {degree: tier for tier, degree in enumerate(degrees_of(case))}
    return [
        (step, number, rank0, tiers[degree], samples)
        for step in range(NUM_STEPS)
        for number, slot in enumerate(_rounded(_slots(case, step), case.stages if case.interleaved else 1))
        for rank0, degree, samples in slot
    ]


def one_by_one(case: Case) -> list[tuple[int, int, int, int, list[int]]]:
    """The yardstick's: every sample in a pack of its own at CP 1."""
    dp = case.data_parallel
    slots = -(-PER_STEP // dp)
    slots += -slots % (case.stages if case.interleaved else 1)
    return [
        (step, i % slots, i // slots, 0, [step * PER_STEP + i]) for step in range(NUM_STEPS) for i in range(PER_STEP)
    ]


def _slots(case: Case, step: int) -> list[Slot]:
    """The slots of a step."""
    left = list(range(step * PER_STEP, (step + 1) * PER_STEP))
    takes: list[list[int]] = []
    if case.packs == "one-token":
        takes.append([i for i in left if LENGTHS[i] == 1])
        left = [i for i in left if LENGTHS[i] > 1]
    slots: list[Slot] = []
    while takes or left:
        slot: Slot = []
        gangs = gangs_of(case)[len(slots) % len(gangs_of(case))]
        for position, degree in enumerate(gangs):
            taken = takes.pop() if takes else _take(left, SAMPLES[case.packs], len(slots) + position, 64 * degree)
            if taken:
                slot.append((sum(gangs[:position]), degree, taken))
        slots.append(slot)
    return slots


def _take(left: list[int], sizes: tuple[int, ...], turn: int, room: int) -> list[int]:
    """Take the next samples out of `left`, as many as it is the turn of and as there is room for."""
    taken: list[int] = []
    while left and len(taken) < sizes[turn % len(sizes)] and LENGTHS[left[0]] <= room:
        taken.append(left.pop(0))
        room -= LENGTHS[taken[-1]]
    return taken


def _rounded(slots: list[Slot], multiple: int) -> list[Slot]:
    """Interleaved stages want a number of micro-batches that they divide: packs, or their samples, get new slots."""
    while len(slots) % multiple:
        widest = max(slots, key=len)
        if len(widest) > 1:
            slots.append([widest.pop()])
        else:
            rank0, degree, samples = max((slot[0] for slot in slots), key=lambda pack: len(pack[2]))
            assert len(samples) > 1, "nothing to split"
            slots.append([(rank0, degree, [samples.pop()])])
    return slots
