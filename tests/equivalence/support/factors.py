"""The factors that could break equivalence, what cannot go together, and cases that cover every pair of the rest.

Pure Python: the ranks of `matrix` and the test that checks the coverage choose the same cases from here.

Three constraints need no entry in `NOT_TOGETHER`, because a factor's values already hold them: interleaved stages are a
value of `pp` (one stage has nothing to interleave), Megatron-LM's distributed optimizer refuses doubles, so the
optimizer says which precision is judged, and what a case needs of ranks says on how many it runs (4, 8 or 16).
"""

import itertools
from dataclasses import dataclass
from functools import cache

MODULES = ("core_attn", "layernorm", "mlp", "mla_up_proj", "moe", "shared_experts")
"""Selective recompute: the modules of Megatron-LM's CPU layers (moe_act is a grouped-GEMM expert's)."""
FACTORS: dict[str, tuple[str, ...]] = {
    "model": ("dense", "moe"),
    "cp": ("1", "2", "4", "mixed"),
    "tp": ("1", "2"),
    "pp": ("1", "2", "4", "2 interleaved"),
    "ep": ("1", "2", "4"),
    "recompute": ("none", *MODULES, "full"),
    "optimizer": ("plain", "distributed"),
    "packs": ("ragged", "one-token", "one sample", "padding"),
}
Value = tuple[str, str]
"""(factor, value of it)."""
Pair = tuple[Value, Value]
"""Two values, in the order of `FACTORS`."""
NOT_TOGETHER: dict[Pair, str] = {
    **{(("model", "dense"), ("ep", ep)): "a dense model has no experts" for ep in ("2", "4")},
    (("model", "dense"), ("recompute", "mla_up_proj")): "grouped-query attention has no latent projections",
    (("model", "dense"), ("recompute", "moe")): "a dense model has no MoE layer",
    (("model", "dense"), ("recompute", "shared_experts")): "a dense model has no shared experts",
}
"""Every pair that no run can have, and why."""
NEW_LAYOUT = 1
"""New pairs that a case must bring to be worth building another layout and its yardstick."""
RANKS = (4, 8, 16)
"""Tried in this order: a pair is covered on the fewest ranks that can have it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A value of each factor, and the ranks it runs on."""

    model: str
    cp: str = "1"
    tp: str = "1"
    pp: str = "1"
    ep: str = "1"
    recompute: str = "none"
    optimizer: str = "plain"
    packs: str = "ragged"
    ranks: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks: " + " ".join(self.cells())

    def cells(self) -> list[str]:
        """The values, those that are numbers with their factor's name."""
        return [f"{f}{v}" if v[0].isdigit() or f == "cp" else v for f, v in self.values()]

    def values(self) -> tuple[Value, ...]:
        """(factor, value) of every factor."""
        return tuple((factor, getattr(self, factor)) for factor in FACTORS)

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return int(self.pp[0])

    @property
    def interleaved(self) -> bool:
        """Two chunks a stage."""
        return self.pp.endswith("interleaved")

    @property
    def data_parallel(self) -> int:
        """Ranks among which micro-batches are distributed, and CP groups made."""
        return self.ranks // (int(self.tp) * self.stages)

    @property
    def layout(self) -> tuple[str, int, int, bool, int]:
        """What cases must have in common to share a yardstick, besides the precision."""
        return self.model, int(self.tp), self.stages, self.interleaved, int(self.ep)

    def fits(self) -> bool:
        """Enough ranks for every group."""
        dp = self.data_parallel
        return dp >= (2 if self.cp == "mixed" else int(self.cp)) and self.ranks // self.stages >= int(self.ep)


ONCE = (
    Case(model="dense", cp="3", ranks=6),
    Case(model="dense", cp="6", ranks=6),
    Case(model="dense", cp="mixed", ranks=6, recompute="full"),
    Case(model="moe", cp="3", ranks=6, recompute="core_attn"),
    Case(model="moe", cp="mixed", ranks=6, optimizer="distributed"),
    Case(model="dense", cp="8", ranks=8),
    Case(model="moe", cp="8", ranks=8, ep="4", recompute="moe"),
    Case(model="dense", cp="mixed", ranks=8),
    Case(model="moe", cp="mixed", ranks=8, ep="2", optimizer="distributed"),
)
"""Degrees 3, 6 and 8, which few ranks can have: once and not with every other value."""


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of values that a case has."""
    return set(itertools.combinations(case.values(), 2))


def all_pairs() -> set[Pair]:
    """Every pair of values of two factors, possible or not."""
    values = [[(factor, value) for value in each] for factor, each in FACTORS.items()]
    return {pair for a, b in itertools.combinations(values, 2) for pair in itertools.product(a, b)}


@cache
def pairwise_cases() -> tuple[Case, ...]:
    """Cases that cover every possible pair, chosen greedily; one that shares its layout's yardstick goes first."""
    numbers = {pair: 1 << i for i, pair in enumerate(sorted(all_pairs() - NOT_TOGETHER.keys()))}
    missing = sum(numbers.values())
    chosen: list[Case] = []
    for ranks in RANKS:
        every = [
            Case(**dict(zip(FACTORS, values, strict=True)), ranks=ranks)
            for values in itertools.product(*FACTORS.values())
        ]
        masks = {
            case: sum(numbers[pair] for pair in pairs)
            for case in every
            if case.fits() and not (pairs := pairs_of(case)) & NOT_TOGETHER.keys()
        }
        layouts: set[tuple] = set()
        while candidates := [case for case in masks if masks[case] & missing]:
            gains = {
                case: (masks[case] & missing).bit_count() - NEW_LAYOUT * (case.layout not in layouts)
                for case in candidates
            }
            best = max(candidates, key=lambda case, gains=gains: (gains[case], case.recompute == "none"))  # type: ignore[misc]
            chosen.append(best)
            layouts.add(best.layout)
            missing &= ~masks[best]
    return tuple(chosen)


def cases(ranks: int) -> tuple[Case, ...]:
    """What runs in the launch of so many ranks, a layout's cases side by side."""
    mine = [case for case in (*pairwise_cases(), *ONCE) if case.ranks == ranks]
    return tuple(sorted(mine, key=lambda case: (case.layout, case.optimizer, str(case))))
