"""What all peers share: their signature, random global batches, tiers of every CP degree, and writing a Plan.

    peer(lengths, *, num_ranks, step_tokens, unit, cost, seed) -> Plan

`unit` is the number of tokens that one rank holds; a gang of c ranks holds unit * c.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.plan import DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel

UNIT = 16384
"""Tokens that one rank holds, as in the paper's setting."""


class Peer(Protocol):
    """The one signature. Raises DataError where a sample does not fit the ranks together."""

    def __call__(
        self, lengths: np.ndarray, *, num_ranks: int, step_tokens: int, unit: int, cost: CostModel, seed: int
    ) -> Plan:
        """Plan one epoch over samples of `lengths` int [n] tokens."""
        ...


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
            f"no CP degree divides {num_ranks} ranks and holds {int(lengths.max())} tokens at {unit} a rank"
        )
    return degree


def tier_of_degree(degree: int, unit: int, cost: CostModel) -> Tier:
    """The tier of one CP degree: `unit` tokens a rank, with as much recompute as `cost` says they need."""
    return cost.with_recompute(Tier(packing_length=unit * degree, cp_degree=degree))


@dataclass
class PlanWriter:
    """Collects packs one by one and makes them a Plan."""

    num_ranks: int
    unit: int
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

    def plan(self, lengths: np.ndarray, *, schedule: str, step_tokens: int, cost: CostModel, seed: int) -> Plan:
        """The Plan of everything added, packs sorted by (step, slot, rank0), checked."""
        columns = {name: np.array(getattr(self, name), np.int32) for name in ("steps", "slots", "ranks", "degrees")}
        order = np.lexsort((columns["ranks"], columns["slots"], columns["steps"]))
        used = np.unique(columns["degrees"])
        ids = np.concatenate([self.samples[pack] for pack in order])
        sizes = np.array([len(self.samples[pack]) for pack in order])
        num_micro_batches = np.zeros(int(columns["steps"].max()) + 1, np.int32)
        np.maximum.at(num_micro_batches, columns["steps"], columns["slots"] + 1)
        plan = Plan(
            tiers=tuple(tier_of_degree(int(degree), self.unit, cost) for degree in used),
            sample_ids=ids,
            lengths=lengths[ids].astype(np.int32),
            pack_offsets=np.concatenate([[0], np.cumsum(sizes)]),
            pack_tier=np.searchsorted(used, columns["degrees"][order]).astype(np.int32),
            pack_step=columns["steps"][order],
            pack_slot=columns["slots"][order],
            pack_rank0=columns["ranks"][order],
            num_micro_batches=num_micro_batches,
            num_ranks=self.num_ranks,
            schedule=schedule,
            seed=seed,
            step_tokens=step_tokens,
            cost_model=cost.name,
            data=DataFingerprint.of(lengths),
        )
        plan.check()
        return plan
