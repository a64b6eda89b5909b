"""What all peers share: random global batches, tiers of every CP degree, and writing a Plan.

A peer is called as every planner is, `peer(samples, request) -> Plan`. A rank holds `unit` tokens, as many as a rank of
the request's shortest tier; a gang of c ranks holds unit * c.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.file import to_json
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.request import Request, Schedule

UNIT = 16384
"""Tokens that one rank holds in the paper's setting."""


def unit_of(request: Request) -> int:
    """Tokens that one rank holds."""
    return request.tiers[0].local_tokens


def cost_of(request: Request) -> CostModel:
    """The request's cost model; where it knows no memory, peers recompute as many layers as the shortest tier."""
    if request.cost.recompute_layers:
        return request.cost
    shortest = request.tiers[0]
    return replace(request.cost, recompute_layers=((shortest.local_tokens, shortest.recompute.num_layers),))


def random_steps(lengths: np.ndarray, step_tokens: int, seed: int) -> list[np.ndarray]:
    """Global batches as a shuffling data loader draws them: sample ids of each, about `step_tokens` tokens in all."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    num_steps = max(1, round(int(ends[-1]) / step_tokens))
    step_of = np.minimum((ends - lengths[order] / 2) * num_steps // ends[-1], num_steps - 1).astype(np.int64)
    starts = np.searchsorted(step_of, np.unique(step_of))
    return np.split(order, starts[1:])


def cp_degrees(num_ranks: int) -> np.ndarray:
    """Powers of two up to `num_ranks`, int64, ascending."""
    return 1 << np.arange(int(num_ranks).bit_length())


def least_degree(lengths: np.ndarray, unit: int, num_ranks: int) -> np.ndarray:
    """Least power of two whose gang holds each sample, int64 [n]. Raises DataError where all ranks are too few."""
    degrees = cp_degrees(num_ranks)
    index = np.searchsorted(unit * degrees, lengths, "left")
    if index.max(initial=0) == len(degrees):
        worst = int(np.argmax(lengths))
        raise DataError(
            f"sample {worst} has {int(lengths[worst])} tokens, {int(degrees[-1])} ranks of {unit} hold fewer; "
            "use more ranks or drop it"
        )
    return degrees[index]


def static_degree(lengths: np.ndarray, unit: int, num_ranks: int) -> int:
    """The least CP degree that holds every sample and divides the ranks. Raises DataError if there is none."""
    degree = int(least_degree(lengths, unit, num_ranks).max())
    while degree <= num_ranks and num_ranks % degree:
        degree *= 2
    if degree > num_ranks:
        raise DataError(
            f"no CP degree divides {num_ranks} ranks and holds {int(lengths.max())} tokens at {unit} per rank"
        )
    return degree


def tier_of_degree(degree: int, unit: int, cost: CostModel) -> Tier:
    """The tier of one CP degree: `unit` tokens per rank, with as much recompute as `cost` says they need."""
    return cost.with_recompute(Tier(packing_length=unit * degree, cp_degree=degree))


@dataclass(kw_only=True)
class PlanWriter:
    """Collects packs one by one and makes them a Plan."""

    request: Request
    degrees: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)

    def add(self, *, step: int, slot: int, rank0: int, degree: int, ids: np.ndarray | list[int]) -> None:
        """One pack: samples `ids` on the gang [rank0, rank0 + degree)."""
        self.steps.append(step)
        self.slots.append(slot)
        self.ranks.append(rank0)
        self.degrees.append(degree)
        self.samples.append(np.asarray(ids, np.int64))

    def add_side_by_side(self, *, step: int, slot: int, gangs: Sequence[tuple[int, np.ndarray | list[int]]]) -> None:
        """One slot of gangs (degree, sample ids), widest first from rank 0 on, which aligns powers of two."""
        rank0 = 0
        for degree, ids in sorted(gangs, key=lambda gang: -gang[0]):
            self.add(step=step, slot=slot, rank0=rank0, degree=degree, ids=ids)
            rank0 += degree

    def plan(self, samples: Samples, *, schedule: Schedule, tiers: Sequence[Tier] = ()) -> Plan:
        """The Plan of everything added, checked; `tiers` replaces the tiers of the degrees used."""
        request, cost = self.request, cost_of(self.request)
        used, pack_tier = np.unique(self.degrees, return_inverse=True)
        ids = np.concatenate(self.samples)
        plan = Plan.build(
            tiers=tuple(tiers) or tuple(tier_of_degree(int(degree), unit_of(request), cost) for degree in used),
            sample_ids=ids,
            lengths=samples.lengths[ids],
            pack_of=np.repeat(np.arange(len(self.samples)), [len(part) for part in self.samples]),
            pack_tier=pack_tier,
            step=np.array(self.steps),
            slot=np.array(self.slots),
            rank0=np.array(self.ranks),
            num_ranks=request.num_ranks,
            schedule=schedule,
            seed=request.seed,
            step_tokens=request.step_tokens,
            cost=to_json(cost),
            data=DataFingerprint.of(samples),
        )
        plan.check()
        return plan
