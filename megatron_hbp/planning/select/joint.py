"""Our selection: tiers, CP degrees and recompute together, by the modelled epoch time of *these* lengths.

The analytic search (select/search.py) proposes chains; the best of them, and the paper's choice, are planned in
earnest, and the least modelled epoch time wins. The paper's choice being among them, ours is never worse than it. Of
epochs within 0.1% of the least the simplest tiers are taken: equal local tokens (static shapes), then the fewest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Recompute, Tier, full_layers, tiers_text
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import PlanMetrics, plan_metrics
from megatron_hbp.planning.measure.quality import lower_bound
from megatron_hbp.planning.planner import make_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.select.paper import TimedSetting, rows_of_cost, select_paper
from megatron_hbp.planning.select.search import grid, nodes, search

PAPER_SHORTEST = 8192
"""The shortest length that the paper's stage 1 tries."""
MAX_PLANNED = 1_000_000
"""Samples that candidates are planned with: a million take 0.6 s of processor time per candidate, of more a draw."""
NEAR = 1e-3
"""Epochs this close to the least, relative, count as equal: what balance leaves idle on a million samples."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tier set that was planned, and what its epoch would take."""

    source: str
    """Who proposed it: "paper" or "joint"."""
    tiers: tuple[Tier, ...]
    metrics: PlanMetrics
    """Of the plan that was made with them."""
    num_slots: int
    """Micro-batches of a rank in the epoch."""
    fixed_seconds: float
    """Seconds of the epoch, the mean over ranks, in micro-batches' fixed cost."""
    recompute_seconds: float
    """... in recompute."""
    exchange_seconds: float
    """... in context-parallel exchange."""

    @property
    def seconds(self) -> float:
        """Modelled epoch time."""
        return self.metrics.epoch_seconds

    @property
    def has_equal_local_tokens(self) -> bool:
        """Whether all tiers keep as many tokens on a rank: static shapes for pipeline, dispatcher and compiler."""
        return len({tier.local_tokens for tier in self.tiers}) == 1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen tiers and all that were tried, best first."""

    tiers: tuple[Tier, ...]
    tried: tuple[Candidate, ...]
    bound: float
    """Seconds that no plan can beat (quality.lower_bound), of the samples planned."""
    num_samples: int
    """Samples that the candidates were planned with."""
    paper_refused: str = ""
    """Why the paper's choice is not among them."""

    @property
    def chosen(self) -> Candidate:
        """What the tiers were chosen for."""
        return next(one for one in self.tried if one.tiers == self.tiers)

    @property
    def reason(self) -> str:
        """One line: why these tiers."""
        best = self.chosen
        others = [one for one in self.tried if one.tiers != best.tiers]
        paper = next((one for one in others if one.source == "paper"), None)
        other = paper or (others[0] if others else None)
        name = "the paper's choice" if paper else "the next best"
        if other is None:
            return f"{_text(best.tiers)}: nothing else fits memory, heads and ranks"
        if best.source == "paper":
            return f"the paper's choice, {_text(best.tiers)}: no epoch that was tried is shorter by {NEAR:.1%}"
        changes = ", ".join(
            f"{getattr(best, f'{what}_seconds') - getattr(other, f'{what}_seconds'):+,.1f} s of {label}"
            for what, label in (("recompute", "recompute"), ("exchange", "exchange"), ("fixed", "fixed cost"))
        )
        return (
            f"{_text(best.tiers)}: an epoch of {best.seconds:,.1f} s, {other.seconds / best.seconds:.3f} x as fast as "
            f"{name} {_text(other.tiers)}; against that {changes}{self._static()}"
        )

    def _static(self) -> str:
        """What equal local tokens would cost."""
        equal = [one for one in self.tried if one.has_equal_local_tokens]
        if self.chosen.has_equal_local_tokens or not equal:
            return ""
        more = equal[0].seconds / self.chosen.seconds - 1
        return f"; equal local tokens ({_text(equal[0].tiers)}) would take {more:.1%} more"


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a selection may choose from, beside the whole layers of the cost model's memory table."""

    degrees: tuple[int, ...] = ()
    """CP degrees; empty: all that divide the ranks."""
    rows: tuple[TimedSetting, ...] = ()
    """What the paper's stage 1 reads; empty: made from the cost model."""
    selective: tuple[tuple[int, Recompute], ...] = ()
    """(local tokens up to which it fits, selective policy)."""


def select_joint(
    samples: Samples,
    request: Request,
    space: Space | None = None,
    *,
    equal_local_tokens: bool = False,
    num_planned: int = 8,
) -> Selection:
    """Choose the tiers of `request` for `samples`; samples beyond `request.longest` tokens are left out.

    The cost model's `recompute_layers` must say what fits (`cost.memory.fitted`). `equal_local_tokens` asks for
    static shapes.
    Raises ConfigError where nothing fits, DataError for samples that cannot be planned.
    """
    space = space or Space()
    cost, num_ranks = request.cost, request.num_ranks
    lengths = _kept(samples.lengths, request.longest)
    longest = int(lengths.max())
    degrees = space.degrees or allowed_degrees(num_ranks, longest, cost)
    _check_reach(longest, degrees, cost)
    if len(lengths) > MAX_PLANNED:
        draw = np.random.default_rng(request.seed).permutation(lengths)[:MAX_PLANNED]
    else:
        draw = lengths
    candidates: dict[tuple[Tier, ...], str] = {}
    paper, refused = _paper(space.rows or rows_for_paper(lengths, cost, degrees), longest)
    if paper and equal_local_tokens and len({tier.local_tokens for tier in paper}) > 1:
        refused = "the paper's tiers do not keep equal local tokens here; leave --equal-local-tokens out"
    elif paper:
        candidates[paper] = "paper"
    settings = nodes(
        grid(longest, degrees, cost.recompute_layers), degrees, space.selective, cost=cost, lengths=lengths
    )
    for demand in {equal_local_tokens, True}:
        keep = num_planned if demand == equal_local_tokens else 2
        for chain in search(lengths, settings, cost, num_ranks, keep=keep, equal_local_tokens=demand):
            candidates.setdefault(chain.tiers, "joint")
    if not candidates:
        raise ConfigError(
            "no tiers of equal local tokens hold these samples within memory; leave --equal-local-tokens out"
        )
    drawn = Samples.of(draw)
    tried = [
        account(make_plan(drawn, replace(request, tiers=tiers, overlong="drop", longest=None)), cost, source)
        for tiers, source in candidates.items()
    ]
    tried.sort(key=lambda one: (one.seconds, len(one.tiers)))
    bound = lower_bound(
        draw, cost, num_ranks, degrees=degrees, num_steps=min(one.metrics.num_steps for one in tried),
        settings=[*((n, full_layers(c)) for n, c in cost.recompute_layers), *space.selective],
    )  # fmt: skip
    return Selection(
        tiers=simplest(tried).tiers,
        tried=tuple(tried),
        bound=bound,
        num_samples=len(draw),
        paper_refused=refused,
    )


def allowed_degrees(num_ranks: int, longest: int, cost: CostModel) -> tuple[int, ...]:
    """CP degrees that divide the ranks, up to the first at which `longest` tokens need no more recompute.

    Heads do not limit them: keys and values can be exchanged at any degree.
    """
    least_local = min(local for local, _ in cost.recompute_layers)
    needed = -(-longest // least_local)
    degrees = [c for c in range(1, num_ranks + 1) if num_ranks % c == 0]
    return tuple(c for c in degrees if c < needed) + tuple(c for c in degrees if c >= needed)[:1]


def _paper(rows: Sequence[TimedSetting], longest: int) -> tuple[tuple[Tier, ...], str]:
    """(the paper's choice, ""), or ((), why there is none): ours may go between the lengths of `rows` and beyond."""
    try:
        return select_paper(rows, longest), ""
    except ConfigError as error:
        return (), str(error)


def simplest(tried: Sequence[Candidate]) -> Candidate:
    """Of the epochs within NEAR of the least, and no longer than that of the paper's choice, that of simplest tiers."""
    limit = min(one.seconds for one in tried) * (1 + NEAR)
    limit = min([limit, *(one.seconds for one in tried if one.source == "paper")])
    near = [one for one in tried if one.seconds <= limit]
    return min(near, key=lambda one: (not one.has_equal_local_tokens, len(one.tiers), one.seconds))


def rows_for_paper(lengths: np.ndarray, cost: CostModel, degrees: Sequence[int]) -> tuple[TimedSetting, ...]:
    """What the paper's stage 1 reads where there is no profile: powers of two from 8K on, timed by the cost model."""
    longest = int(lengths.max())
    top = max(PAPER_SHORTEST, 1 << (longest - 1).bit_length())
    powers = [1 << k for k in range(PAPER_SHORTEST.bit_length() - 1, top.bit_length())]
    reach = max(local for local, _ in cost.recompute_layers) * max(degrees)
    unit = int(np.lcm.reduce([256, *degrees]))
    # A longest length that does not fit rounded up to a power of two is tried as it is.
    tops = [length for length in powers if length <= reach]
    if not tops or tops[-1] < longest:
        tops.append(min(reach // unit * unit, -(-longest // unit) * unit) or PAPER_SHORTEST)
    return rows_of_cost(cost, tops, degrees=degrees, sample_lengths=lengths)


def account(plan: Plan, cost: CostModel, source: str) -> Candidate:
    """What `plan`'s epoch takes and where its time goes."""
    plain = tuple(replace(tier, recompute=Recompute()) for tier in plan.tiers)
    without = {
        "recompute": (cost, plain),
        "exchange": (cost.without_exchange(), plan.tiers),
    }
    whole = _rank_seconds(plan, cost, plan.tiers)
    fixed = np.array([cost.tier_cost(tier).fixed for tier in plain])
    return Candidate(
        source=source,
        tiers=plan.tiers,
        metrics=plan_metrics(plan, cost),
        num_slots=int(plan.num_micro_batches.sum()),
        fixed_seconds=float((fixed[plan.pack_tier] * plan.pack_cp).sum()) / plan.num_ranks,
        **{f"{what}_seconds": whole - _rank_seconds(plan, *other) for what, other in without.items()},
    )


def _rank_seconds(plan: Plan, cost: CostModel, tiers: Sequence[Tier]) -> float:
    """Seconds of all packs, the mean over ranks."""
    seconds = cost.pack_seconds(tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    return float((seconds * plan.pack_cp).sum()) / plan.num_ranks


def _kept(lengths: np.ndarray, longest: int | None) -> np.ndarray:
    """The samples of at most `longest` tokens."""
    kept = lengths if longest is None else lengths[lengths <= longest]
    if not len(kept):
        raise DataError(f"no sample has at most {longest} tokens, the shortest has {lengths.min()}; raise the limit")
    return kept


def _check_reach(longest: int, degrees: Sequence[int], cost: CostModel) -> None:
    """Raise ConfigError unless the memory table suits the model, and the longest sample fits at some CP degree."""
    deepest = max(count for _, count in cost.recompute_layers)
    if deepest > cost.num_layers:
        raise ConfigError(
            f"the memory table has {deepest} recomputed layers, {cost.name} has {cost.num_layers}; correct --memory"
        )
    local, degree = max(tokens for tokens, _ in cost.recompute_layers), max(degrees)
    if local * degree < longest:
        raise ConfigError(
            f"the longest sample has {longest} tokens; with {cost.name} {local} fit on a rank, {local * degree} at the "
            f"largest CP degree {degree} that the ranks allow; use more ranks, or leave long samples out "
            f"(--longest {local * degree} --overlong drop)"
        )


def _text(tiers: tuple[Tier, ...]) -> str:
    return f"[{tiers_text(tiers)}]"
