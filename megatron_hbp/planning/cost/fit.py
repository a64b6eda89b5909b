"""Fit a cost model to a profile table: least squares with non-negative coefficients, numpy alone.

The formula of cost/model.py is linear in its unknowns when written as seconds of

    1                              every micro-batch          [CP degree c], [policy p]   what these add to that
    T / c                          linear                     S / c             attention
    T / c  [policy p]              GEMMs that p runs again    S / c  [policy p] attention that p runs again
    T / c * L * 2 e(c) * (1 + back + again)                   exchange inside a node, and across nodes

where `again` is 1 where attention runs again, `back` what the backward receives over the forward's bytes; "full n"
counts n / L of "full". Rows weigh by 1 / seconds, so an error of 5% is the same in a short and a long row.

All rows enter the fit that plans use. What a plan may expect is each row's error in another fit, which never saw it:
rows are held out a fifth at a time. (On two cores, 20 rows of 3 repeats: packs of other plans were predicted with a
median error of 2 to 6% by the fit of four fifths of the rows, of 2 to 4% by that of all.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.cost.model import CostModel, measured_policy, rule_shares
from megatron_hbp.planning.cost.profile_memory import layers_by_local_tokens
from megatron_hbp.planning.cost.profile_table import Measurement, ProfileHeader, ProfileTable

FOLDS = 5
"""Every fifth row, in the order of their cost, is held out at a time."""


@dataclass(frozen=True, kw_only=True)
class RowError:
    """One row against the fit."""

    row: Measurement
    predicted: float
    """Seconds, by the fit to all rows."""
    unseen: float
    """Seconds, by a fit that this row and those held out with it did not enter."""

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        assert self.row.seconds
        return self.predicted / self.row.seconds - 1

    @property
    def held_out_error(self) -> float:
        """unseen / measured - 1."""
        assert self.row.seconds
        return self.unseen / self.row.seconds - 1


@dataclass(frozen=True, kw_only=True)
class ProfileFit:
    """A fitted cost model and its error, row by row."""

    cost: CostModel
    errors: tuple[RowError, ...]

    def absolute_errors(self, *, held_out: bool) -> np.ndarray:
        """|predicted / measured - 1| [rows], as fitted or held out."""
        return np.abs([each.held_out_error if held_out else each.error for each in self.errors])


def fit_profile(table: ProfileTable, *, name: str) -> ProfileFit:
    """Fit all constants that the rows tell apart. Raises DataError where fewer rows than unknowns fit into memory."""
    rows = sorted((r for r in table.rows if r.fits), key=lambda r: (r.seconds, str(r.setting)))
    columns = {key: values for key, values in _columns(rows, table.header).items() if values.any()}
    held = -(-len(rows) // FOLDS)
    if len(rows) - held < len(columns) + 1:
        raise DataError(
            f"{len(rows) - held} rows that fit into memory (and {held} held out) cannot determine {len(columns)} "
            f"constants: profile more lengths (--hbp-profile-lengths) or fewer CP degrees and recompute policies"
        )
    features = np.stack(list(columns.values()), axis=1)
    seconds = np.array([row.seconds for row in rows])

    def fitted(seen: np.ndarray) -> CostModel:
        """To the rows that are `seen` [rows], bool."""
        found = nonnegative_least_squares(features[seen] / seconds[seen, None], np.ones(seen.sum()))
        return _cost_model(name, table, dict(zip(columns, found.tolist(), strict=True)))

    fold = np.arange(len(rows)) % FOLDS
    cost, others = fitted(fold >= 0), [fitted(fold != i) for i in range(FOLDS)]
    return ProfileFit(cost=cost, errors=tuple(
        RowError(
            row=row, predicted=predicted_seconds(cost, row, table.header.exchange),
            unseen=predicted_seconds(others[i], row, table.header.exchange),
        )
        for row, i in zip(rows, fold, strict=True)
    ))  # fmt: skip


def predicted_seconds(cost: CostModel, row: Measurement, exchange: str) -> float:
    """What `cost` says of a row's pack, which was exchanged by `exchange`."""
    tier = replace(row.setting.tier, exchange=exchange)
    return float(cost.tier_cost(tier).seconds(row.tokens, row.squares))


def nonnegative_least_squares(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin |features x - target| over x >= 0 (Lawson and Hanson 1974, chapter 23). features [n, k], target [n]."""
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0] = 1.0
    a = features / scale  # the columns span fifteen orders of magnitude
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(10 * a.shape[1]):
        gradient = np.where(free, -np.inf, a.T @ (target - a @ x))
        if gradient.max(initial=-np.inf) <= 1e-10:
            break
        free[gradient.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            blocked = free & (trial <= 0)
            step = (x[blocked] / np.maximum(x[blocked] - trial[blocked], 1e-300)).min()
            x = x + step * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = trial
    return x / scale


def _columns(rows: Sequence[Measurement], header: ProfileHeader) -> dict[str, np.ndarray]:
    """Feature name -> its values [rows]."""
    model, node = header.model, header.layout["node_size"]
    shape = model.attention.on_tensor_parallel_rank(header.layout["tensor_parallel"])
    tokens = np.array([row.tokens / row.cp_degree for row in rows])
    squares = np.array([row.squares / row.cp_degree for row in rows])
    degree = np.array([row.cp_degree for row in rows])
    columns = {"fixed": np.ones(len(rows)), "token": tokens, "square": squares}
    again = np.array([rule_shares(row.setting.policy, model.num_layers)[1] for row in rows])
    kind = EXCHANGES[header.exchange]
    sent = np.array([kind.elements(shape, c) if c > 1 else 0.0 for c in degree.tolist()])
    sent *= 2.0 * header.layout["tensor_parallel"] * (1 + kind.backward_bytes + again)
    exchange = tokens * model.num_layers * sent
    columns["node"] = np.where(degree <= node, exchange, 0.0)
    columns["cluster"] = np.where(degree > node, exchange, 0.0)
    for c in np.unique(degree[degree > 1]):
        columns[f"group {c}"] = (degree == c).astype(float)
    policies = [measured_policy(row.setting.policy, model.num_layers) for row in rows]
    for name in sorted({policy for policy, _ in policies} - {""}):
        part = np.array([share if policy == name else 0.0 for policy, share in policies])
        columns[f"token {name}"], columns[f"square {name}"] = part * tokens, part * squares
        columns[f"policy {name}"] = part
    return columns


def _cost_model(name: str, table: ProfileTable, found: dict[str, float]) -> CostModel:
    """Coefficients as rates and shares; a coefficient of 0 is an infinite rate."""
    header = table.header
    model, tp = header.model, header.layout["tensor_parallel"]

    def rate(work: float, key: str) -> float:
        """Of one GPU; the coefficients are those of a rank of `tp`."""
        return work / found[key] / tp if found.get(key, 0.0) > 0 else np.inf

    # Shares are relative to the forward: a third of the linear seconds, 1 of 3.5 of attention's.
    forward, attends = found.get("token", 0.0) / 3, found.get("square", 0.0) / 3.5
    policies = [key.removeprefix("policy ") for key in found if key.startswith("policy ")]
    shares = tuple(
        (
            key,
            found[f"token {key}"] / forward if forward else 0.0,
            found[f"square {key}"] / attends if attends else 0.0,
        )
        for key in policies
    )
    node = rate(1.0, "node")
    machine = Machine(
        name=header.device,
        linear_rate=rate(model.linear_flops(header.supervised), "token"),
        attention_rate=rate(3.5 * model.attention_flops, "square"),
        node_bandwidth=node,
        # nothing measured across nodes: not faster than inside one
        cluster_bandwidth=rate(1.0, "cluster") if "cluster" in found else node,
        node_size=header.layout["node_size"] * tp,
        memory=table.memory_limit or np.inf,
        memory_reserve=0.0,  # the limit counts what lies outside the allocator
    )
    return CostModel(
        name=name,
        model=model,
        machine=machine,
        tensor_parallel=tp,
        supervised=header.supervised,
        micro_batch_seconds=found.get("fixed", 0.0),
        recompute_layers=layers_by_local_tokens(table),
        recompute_shares=shares,
        recompute_seconds=tuple((key, found[f"policy {key}"]) for key in policies),
        group_seconds=tuple(
            (int(key.removeprefix("group ")), value) for key, value in found.items() if key.startswith("group ")
        ),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two series [n]; ties share their mean rank."""
    x, y = (_ranks(np.asarray(values, float)) for values in (a, b))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    bounds = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    for start, end in pairwise([*bounds.tolist(), len(values)]):
        ranks[order[start:end]] = (start + end - 1) / 2
    return ranks
