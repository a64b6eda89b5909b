"""FlexSP: a mixed-integer program per micro-batch chooses CP groups and who runs what, to end as early as possible.

Source: Wang et al., "FlexSP: Accelerating Large Language Model Training via Flexible Sequence Parallelism", arXiv
2412.01523, from the paper's text. Solver: HiGHS through `highspy` (the paper: SCIP).

1. Bucketing: lengths of a micro-batch become at most `num_buckets` values, by the dynamic program that rounds up
   by the fewest tokens in all.
2. Chunking: a random global batch, sorted by length, is cut into M micro-batches of like tokens; M is tried from the
   least that memory allows, `trials` values in all, and the M of least total time wins.
3. Program: binary m_g, is group g of degree d_g formed; integers a_qg, samples of bucket q in group g; minimise T with
       fixed m_g + sum_q a_qg (per_token_d s_q + per_square_d s_q^2) <= T     every group ends in time
       sum_q a_qg s_q <= unit d_g m_g                                           memory
       sum_g d_g m_g <= ranks,   sum_g a_qg = samples of q,   m_g >= m_g+1 among groups of one degree

The paper's system shards parameters (ZeRO-3), so that every micro-batch is a barrier: "lockstep".

Simplified: no separate cost of making groups; the search stops at `time_limit` seconds a micro-batch and takes what it
has, so that plans may differ between machines. Meant for a few steps: seconds each (the paper: 5 to 15).
"""

from dataclasses import dataclass

import highspy
import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel, TierCost
from megatron_hbp.planning.peers.common import UNIT, PlanWriter, cp_degrees, least_degree, random_steps, tier_of_degree

Gangs = list[tuple[int, np.ndarray]]
"""CP degree and sample ids of each gang of one micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every program of a run shares."""

    num_ranks: int
    unit: int
    costs: dict[int, TierCost]
    """Of each CP degree."""
    time_limit: float
    num_buckets: int
    trials: int


def flexsp(
    lengths: np.ndarray,
    *,
    num_ranks: int,
    step_tokens: int,
    unit: int = UNIT,
    cost: CostModel,
    seed: int = 0,
    time_limit: float = 5.0,
    num_buckets: int = 16,
    trials: int = 2,
) -> Plan:
    """Solve every random step. See the head of this module."""
    least_degree(lengths, unit, num_ranks)
    setting = Setting(
        num_ranks=num_ranks,
        unit=unit,
        costs={int(d): cost.tier_cost(tier_of_degree(int(d), unit, cost)) for d in cp_degrees(num_ranks)},
        time_limit=time_limit,
        num_buckets=num_buckets,
        trials=trials,
    )
    writer = PlanWriter(num_ranks, unit)
    for step, ids in enumerate(random_steps(lengths, step_tokens, seed)):
        ordered = ids[np.argsort(-lengths[ids], kind="stable")]
        for slot, gangs in enumerate(solve_step(ordered, lengths, setting)):
            writer.add_side_by_side(step=step, slot=slot, gangs=gangs)
    return writer.plan(lengths, schedule="lockstep", step_tokens=step_tokens, cost=cost, seed=seed)


def solve_step(ordered: np.ndarray, lengths: np.ndarray, setting: Setting) -> list[Gangs]:
    """The best of several micro-batch counts for the samples `ordered`, longest first."""
    sizes = lengths[ordered]
    count = -(-int(sizes.sum()) // (setting.unit * setting.num_ranks))
    best: tuple[float, list[Gangs]] | None = None
    tried = 0
    while best is None or tried < setting.trials:
        if count > len(ordered):
            break
        chunks = np.split(ordered, cut_points(sizes, count))
        solved = [solve(chunk, lengths[chunk], setting) for chunk in chunks]
        total = sum(seconds for seconds, _ in solved)
        if np.isfinite(total) and (best is None or total < best[0]):
            best = total, [gangs for _, gangs in solved]
        tried += 1
        count += 1
    assert best is not None, "a micro-batch of one sample has a solution"
    return best[1]


def cut_points(sizes: np.ndarray, count: int) -> np.ndarray:
    """Where to cut samples of `sizes` into `count` runs of like tokens, none empty."""
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, "left") + 1
    cuts = np.maximum.accumulate(np.maximum(cuts - np.arange(count - 1), 1)) + np.arange(count - 1)
    return np.minimum(cuts, len(sizes) - count + np.arange(1, count))


def buckets(sizes: np.ndarray, num_buckets: int) -> np.ndarray:
    """Bucket of each of `sizes` [n], numbered by length: consecutive lengths that are rounded up by least in all."""
    values, of_value, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    num_buckets = min(num_buckets, len(values))
    number = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * values)])
    # rounding[i, j]: values i .. j - 1 rounded up to the last of them; first bucket first.
    upper = np.concatenate([[0], values])
    rounding = upper * (number - number[:, None]) - (tokens - tokens[:, None]).astype(float)
    rounding[np.tril_indices(len(upper))] = np.inf
    least, starts = rounding[0], []
    for _ in range(num_buckets - 1):
        total = least[:, None] + rounding
        starts.append(total.argmin(axis=0))
        least = total.min(axis=0)
    bounds = [len(values)]
    for start in reversed(starts):
        bounds.append(int(start[bounds[-1]]))
    return np.searchsorted(np.array(bounds[::-1]), np.arange(len(values)), "right")[of_value]


def solve(ids: np.ndarray, sizes: np.ndarray, setting: Setting) -> tuple[float, Gangs]:
    """Groups for one micro-batch: (modelled seconds, gangs), infinity where the solver finds none."""
    bucket_of = buckets(sizes, setting.num_buckets)
    uppers = np.array([sizes[bucket_of == bucket].max() for bucket in range(bucket_of.max() + 1)])
    counts = np.bincount(bucket_of)
    degrees = np.concatenate([np.full(setting.num_ranks // d, d) for d in setting.costs])
    chosen = run_program(uppers, counts, degrees, setting)
    if chosen is None:
        return np.inf, []
    gangs: Gangs = []
    slowest = 0.0
    members = [list(ids[bucket_of == bucket]) for bucket in range(len(counts))]
    for group, degree in enumerate(degrees.tolist()):
        taken = [members[bucket].pop() for bucket, number in enumerate(chosen[:, group]) for _ in range(number)]
        if taken:
            gangs.append((degree, np.array(taken)))
            mine = sizes[np.isin(ids, taken)].astype(float)
            slowest = max(slowest, float(setting.costs[degree].seconds(mine.sum(), (mine**2).sum())))
    return slowest, gangs


def run_program(uppers: np.ndarray, counts: np.ndarray, degrees: np.ndarray, setting: Setting) -> np.ndarray | None:
    """Samples of each bucket in each group, int64 [buckets, groups], or None.

    Variables are T, m [groups] and a [buckets, groups], in this order.
    """
    num_buckets, num_groups = len(uppers), len(degrees)
    costs = [setting.costs[degree] for degree in degrees.tolist()]
    coefficients = np.array([(cost.fixed, cost.per_token, cost.per_square) for cost in costs])
    fixed, per_token, per_square = coefficients.T
    seconds = per_token * uppers[:, None] + per_square * uppers[:, None].astype(float) ** 2
    room = setting.unit * degrees
    most = np.minimum(counts[:, None], room // uppers[:, None]).astype(float)

    num_variables = 1 + num_groups + num_buckets * num_groups
    form = 1 + np.arange(num_groups)
    place = 1 + num_groups + np.arange(num_buckets * num_groups).reshape(num_buckets, num_groups)
    solver = highspy.Highs()
    for option, value in (
        ("output_flag", False), ("threads", 1), ("time_limit", setting.time_limit), ("mip_rel_gap", 0.01),
        ("random_seed", 0),
    ):  # fmt: skip
        solver.setOptionValue(option, value)
    upper_bounds = np.concatenate([[1e30], np.ones(num_groups), most.ravel()])
    solver.addVars(num_variables, np.zeros(num_variables), upper_bounds)
    solver.changeColCost(0, 1.0)
    integers = np.arange(1, num_variables, dtype=np.int32)
    solver.changeColsIntegrality(len(integers), integers, np.full(len(integers), highspy.HighsVarType.kInteger))

    def add_row(low: float, high: float, columns: np.ndarray, values: np.ndarray) -> None:
        solver.addRow(low, high, len(columns), columns.astype(np.int32), values.astype(float))

    for group in range(num_groups):
        columns = np.concatenate([[0, form[group]], place[:, group]])
        add_row(-1e30, 0.0, columns, np.concatenate([[-1.0, fixed[group]], seconds[:, group]]))
        add_row(-1e30, 0.0, columns[1:], np.concatenate([[-room[group]], uppers]))
        if group and degrees[group] == degrees[group - 1]:
            add_row(0.0, 1e30, form[group - 1 : group + 1], np.array([1.0, -1.0]))
    for bucket in range(num_buckets):
        add_row(counts[bucket], counts[bucket], place[bucket], np.ones(num_groups))
    add_row(0.0, setting.num_ranks, form, degrees)

    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = np.array(solver.getSolution().col_value)
    chosen = np.rint(values[place]).astype(np.int64)
    return chosen if (chosen.sum(axis=1) == counts).all() else None
