"""The paper's selection of tiers (section 3.3): what a setting costs and whether it fits, and its two stages.

    stage 1  for each packing length the fastest (CP degree, recompute) that fits; l_best has the least time per token
    stage 2  tiers {l_best / c, l_best, l_max / c_max, l_max}: a sample no longer than l / c needs no exchange

Settings come from a profile, from the paper's tables, or from a cost model and its memory table.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.tiers import Recompute, Tier, check_tiers
from megatron_hbp.planning.cost.model import CostModel, least_recompute


@dataclass(frozen=True, kw_only=True)
class TimedSetting:
    """A setting, and the time that one full pack takes with it."""

    length: int
    """Tokens of a pack."""
    cp_degree: int
    recompute: Recompute = field(default_factory=Recompute)
    seconds: float = math.inf
    """Seconds of one full pack on its gang, forward and backward."""
    fits: bool = True
    """Whether it ran within memory."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.cp_degree < 1 or self.length % self.cp_degree:
            raise ConfigError(
                f"profile row {self.length}:cp{self.cp_degree}: the CP degree must divide the packing length; "
                "profile lengths that are multiples of it"
            )
        if self.fits and not 0 < self.seconds < math.inf:
            raise ConfigError(
                f"profile row {self.tier}: a setting that fits took some time, not {self.seconds} s; profile it again"
            )

    @property
    def tier(self) -> Tier:
        """The setting as a tier."""
        return Tier(packing_length=self.length, cp_degree=self.cp_degree, recompute=self.recompute)

    @property
    def seconds_per_token(self) -> float:
        """Rank-seconds per token."""
        return self.seconds * self.cp_degree / self.length


def memory_table(rows: Iterable[TimedSetting]) -> tuple[tuple[int, int], ...]:
    """(local tokens, fewest recomputed layers) of the rows that fit; rows with selective recompute say nothing here."""
    fewest: dict[int, int] = {}
    for row in rows:
        if row.fits and row.recompute.granularity != "selective":
            local = row.length // row.cp_degree
            fewest[local] = min(fewest.get(local, row.recompute.num_layers), row.recompute.num_layers)
    return tuple(sorted(fewest.items()))


def rows_of_cost(
    cost: CostModel,
    packing_lengths: Iterable[int],
    *,
    degrees: Sequence[int],
    sample_lengths: np.ndarray | None = None,
) -> tuple[TimedSetting, ...]:
    """What a profile would find if `cost` were right: every length at every degree, the least recompute that fits.

    Packs hold samples like those of `sample_lengths` int [n] that fit into them; one sample each without it, or where
    none fits.
    """
    rows = []
    for length in packing_lengths:
        mean = mean_length(sample_lengths, length)
        for degree in degrees:
            if length % degree:
                continue
            recompute = least_recompute(cost.recompute_layers, length / degree)
            if recompute is None:
                rows.append(TimedSetting(length=length, cp_degree=degree, fits=False))
                continue
            one = cost.tier_cost(Tier(packing_length=length, cp_degree=degree, recompute=recompute))
            seconds = one.fixed + one.per_token * length + one.per_square * length * mean
            rows.append(TimedSetting(length=length, cp_degree=degree, recompute=recompute, seconds=seconds))
    return tuple(rows)


def mean_length(sample_lengths: np.ndarray | None, packing_length: int) -> float:
    """Tokens-weighted mean length, sum s^2 / sum s, of the samples that fit; the packing length without any."""
    if sample_lengths is None:
        return float(packing_length)
    fitting = sample_lengths[sample_lengths <= packing_length].astype(float)
    return float((fitting**2).sum() / fitting.sum()) if len(fitting) else float(packing_length)


def select_paper(rows: Sequence[TimedSetting], longest: int) -> tuple[Tier, ...]:
    """The paper's tiers (algorithms 1, 3, 4) for samples of up to `longest` tokens.

    l_max is the shortest profiled length that holds `longest`. l_best / c and l_max / c_max run at CP 1 with the
    recompute of the tier they come from (their local tokens are equal); l_max / c_max is left out below l_best. Where
    lengths grow but degrees would fall, which no plan can serve, the longer tier takes the shorter one's degree.
    Raises ConfigError with no rows, no row that fits, or none that is long enough.
    """
    fastest = _fastest(rows, longest)
    longest_row = fastest[max(fastest)]
    best = min(fastest.values(), key=lambda row: (row.seconds_per_token, -row.length))
    found = {best.length // best.cp_degree: _alone(best)}
    second = _alone(longest_row)
    if second.length >= best.length:
        found.setdefault(second.length, second)
    found |= {best.length: best, longest_row.length: longest_row}
    tiers: list[Tier] = []
    for _, row in sorted(found.items()):
        degree = max([row.cp_degree, *(tier.cp_degree for tier in tiers)])
        tiers.append(row.tier if degree == row.cp_degree else _widened(rows, row, degree))
    check_tiers(tuple(tiers))
    return tuple(tiers)


def _fastest(rows: Sequence[TimedSetting], longest: int) -> dict[int, TimedSetting]:
    """Stage 1: packing length up to l_max -> its fastest row that fits."""
    if not rows:
        raise ConfigError("the profile has no rows to select tiers from; run `hbp profile`")
    fitting = [row for row in rows if row.fits]
    if not fitting:
        least = min(row.length // row.cp_degree for row in rows)
        raise ConfigError(
            f"none of the {len(rows)} profiled settings fits into memory, not even {least} tokens on a rank; "
            "profile higher CP degrees, more recompute or shorter lengths"
        )
    enough = [row.length for row in fitting if row.length >= longest]
    if not enough:
        raise ConfigError(
            f"no profiled setting that fits holds the longest sample of {longest} tokens (the longest that fits is "
            f"{max(row.length for row in fitting)}); profile longer packs at a higher CP degree, or shorten the samples"
        )
    candidates = [row for row in fitting if row.length <= min(enough)]
    found: dict[int, TimedSetting] = {}
    for row in sorted(candidates, key=lambda row: row.seconds_per_token):
        found.setdefault(row.length, row)
    return found


def _alone(row: TimedSetting) -> TimedSetting:
    """The same local tokens and recompute at CP 1."""
    return TimedSetting(
        length=row.length // row.cp_degree, cp_degree=1, recompute=row.recompute, seconds=row.seconds, fits=row.fits
    )


def _widened(rows: Sequence[TimedSetting], row: TimedSetting, degree: int) -> Tier:
    """`row` at a higher CP degree: as profiled there, else with the least recompute known to fit."""
    known = [other for other in rows if other.fits and (other.length, other.cp_degree) == (row.length, degree)]
    if known:
        return min(known, key=lambda other: other.seconds).tier
    recompute = least_recompute(memory_table(rows), row.length / degree) or row.recompute
    return Tier(packing_length=row.length, cp_degree=degree, recompute=recompute)
