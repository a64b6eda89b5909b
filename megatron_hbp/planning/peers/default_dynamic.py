"""Dynamic CP as Megatron-LM's development branch plans it (`default_dynamic_cp`), on random global batches.

Source: the description of the packing-aware scheduler on the dev branch (August 2026), written anew from its rules:

1. Samples of a global batch are taken longest first; a sample needs the least power of two of ranks that holds it.
2. A micro-batch is opened by its longest sample. Each further sample joins a gang, or opens one on free ranks, of any
   degree from its least up, wherever the costliest rank of the micro-batch (sum of s^2 / CP) stays lowest; ties go to
   the smaller degree, then to the older gang, then to a new one.
3. A gang holds at most `unit` tokens per rank, and no rank may cost over 1.05 * longest * unit.
4. What finds no place opens the next micro-batch.
5. Ranks left empty are filled by doubling the CP degree of a smallest gang, again and again; where that cannot fill
   them, the micro-batch is redone with everything that fits in one gang of all ranks.

Every rank then has one pack in every micro-batch and counts are equal, so the plan is "lockstep", as with pipelines,
experts or sharded parameters. (Dense models with replicated parameters meet only in gangs and at the end of a step.)

Simplified: no gang is doubled beyond the heads (the cost model prices a2a); where heads are fewer than ranks, ranks
that stay empty run dummies, and nothing is redone in one gang of all. Gangs stand in order of width; no alignment of
micro-batch counts for interleaved pipelines.
"""

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.peers.common import PlanWriter, least_degree, random_steps, unit_of
from megatron_hbp.planning.request import Request

CAP_SLACK = 1.05
"""A rank's cost may exceed longest * unit by this factor."""


class Gang:
    """Ranks that share one pack of the micro-batch in the making."""

    __slots__ = ("degree", "ids", "local_tokens", "squares")

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.ids: list[int] = []
        self.local_tokens = 0.0
        self.squares = 0.0
        """Sum of s^2 / degree: what one of its ranks costs."""

    def take(self, sample: int, length: int) -> None:
        """Add one sample."""
        self.ids.append(sample)
        self.local_tokens += length / self.degree
        self.squares += length * length / self.degree


def default_dynamic(samples: Samples, request: Request) -> Plan:
    """Plan random steps one after the other, micro-batch by micro-batch. See the head of this module."""
    lengths, num_ranks, unit = samples.lengths, request.num_ranks, unit_of(request)
    least = least_degree(lengths, unit, num_ranks)
    widest = min(num_ranks, request.cost.model.attention.num_query_heads)
    writer = PlanWriter(request=request)
    for step, ids in enumerate(random_steps(lengths, request.step_tokens, request.seed)):
        rest = ids[np.argsort(-lengths[ids], kind="stable")]
        slot = 0
        while len(rest):
            sizes, needs = lengths[rest].tolist(), least[rest].tolist()
            gangs, left = micro_batch(sizes, needs, num_ranks, unit, widest)
            writer.add_side_by_side(step=step, slot=slot, gangs=[(g.degree, rest[g.ids]) for g in gangs])
            rest = rest[left]
            slot += 1
    return writer.plan(samples, schedule="lockstep")


def micro_batch(
    sizes: list[int], needs: list[int], num_ranks: int, unit: int, widest: int
) -> tuple[list[Gang], list[int]]:
    """One micro-batch of samples of `sizes` tokens, longest first, which need `needs` ranks: (gangs, left over).

    No sample takes more ranks than it needs beyond a degree of `widest`.
    """
    cap = CAP_SLACK * sizes[0] * unit
    first = Gang(needs[0])
    first.take(0, sizes[0])
    gangs, by_degree = [first], {first.degree: [first]}
    peak, free = first.squares, num_ranks - first.degree
    shortest = sizes[-1]
    left: list[int] = []
    for sample in range(1, len(sizes)):
        length = sizes[sample]
        best, degree = _best_place(length, needs[sample], by_degree, free, peak, cap, unit, widest)
        if degree == 0:
            left.append(sample)
            continue
        if best is None:
            best = Gang(degree)
            gangs.append(best)
            by_degree.setdefault(degree, []).append(best)
            free -= degree
        best.take(sample, length)
        peak = max(peak, best.squares)
        if best.local_tokens + shortest / best.degree > unit:  # nothing fits any more: later samples need not look
            by_degree[best.degree].remove(best)
    if free and not _fill_free_ranks(gangs, free, widest) and widest == num_ranks:
        return _one_gang(sizes, num_ranks, unit)
    return gangs, left


def _best_place(
    length: int, need: int, by_degree: dict[int, list[Gang]], free: int, peak: float, cap: float, unit: int,
    widest: int,
) -> tuple[Gang | None, int]:  # fmt: skip
    """The gang to join, or None and the degree of a new one, or (None, 0) where there is no place."""
    best, best_degree, best_peak = None, 0, np.inf
    degree = need
    while degree <= max(widest, need):
        work, local = length * length / degree, length / degree
        for gang in by_degree.get(degree, ()):
            if gang.local_tokens + local > unit:
                continue
            projected = max(peak, gang.squares + work)
            if projected <= cap and projected < best_peak:
                best, best_degree, best_peak = gang, degree, projected
                if projected == peak:  # no place is better, and ties go to the first
                    return best, best_degree
        if free >= degree:
            projected = max(peak, work)
            if projected <= cap and projected < best_peak:
                best, best_degree, best_peak = None, degree, projected
                if projected == peak:
                    return None, degree
        degree *= 2
    return best, best_degree


def _fill_free_ranks(gangs: list[Gang], free: int, widest: int) -> bool:
    """Double smallest gangs until no rank is free; False where a doubling would need more ranks than are free."""
    while free:
        smallest = min(gangs, key=lambda gang: gang.degree)
        wider = min(2 * smallest.degree, widest)
        if wider <= smallest.degree or wider - smallest.degree > free or wider & (wider - 1):
            return False
        free -= wider - smallest.degree
        smallest.degree = wider
    return True


def _one_gang(sizes: list[int], num_ranks: int, unit: int) -> tuple[list[Gang], list[int]]:
    """All ranks, or the widest power of two of them, as one gang: (gangs, left over)."""
    gang, left = Gang(1 << (num_ranks.bit_length() - 1)), []
    for sample, length in enumerate(sizes):
        if gang.local_tokens + length / gang.degree <= unit:
            gang.take(sample, length)
        else:
            left.append(sample)
    return [gang], left
