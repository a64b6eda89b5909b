"""Fit a cost model's rates to measured iteration times: least squares on log(seconds), by Gauss-Newton, numpy alone.

The unknowns are positive and span fifteen orders of magnitude, so their logarithms are fitted; so are the times, since
an error of 5% weighs the same in a short and a long row. Steps are damped (Levenberg-Marquardt), the Jacobian is taken
by central differences: a handful of unknowns and a score of rows need no more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel

RATES = ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth", "micro_batch_seconds")
"""Fields of a cost model that a fit may change."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measured iteration: `micro_batches` full packs of one tier, one after the other."""

    label: str
    tier: Tier
    seconds: float
    micro_batches: float = 1.0
    sample_tokens: float | str = 0.0
    """Tokens-weighted mean length of the samples (sum s^2 / sum s); a name where it is fitted too; 0: one sample."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A calibrated cost model and how well it does."""

    cost: CostModel
    lengths: dict[str, float]
    """Fitted sample lengths by name, tokens."""
    predicted: np.ndarray
    """Seconds of each timing."""
    errors: np.ndarray
    """predicted / measured - 1."""
    spread: dict[str, float]
    """Standard error of each unknown, relative: how well the rows determine it (inf: not at all)."""


def fit(cost: CostModel, timings: Sequence[Timing], *, unknowns: Sequence[str] = RATES, steps: int = 200) -> Fit:
    """Fit `unknowns` (fields of the cost model) and the named sample lengths. Raises DataError with too few rows."""
    names = sorted({row.sample_tokens for row in timings if isinstance(row.sample_tokens, str)})
    if len(timings) < len(unknowns) + len(names):
        raise DataError(f"{len(timings)} timings cannot determine {len(unknowns) + len(names)} unknowns; time more")
    wanted = np.log([row.seconds for row in timings])

    def model(logs: np.ndarray) -> np.ndarray:
        values = dict(zip([*unknowns, *names], np.exp(logs).tolist(), strict=True))
        return np.log(predict(_with_rates(cost, values, unknowns), timings, values))

    logs = np.log([*(getattr(cost, name) for name in unknowns), *(8192.0 for _ in names)])
    logs, jacobian = _least_squares(model, logs, wanted, steps)
    values = dict(zip([*unknowns, *names], np.exp(logs).tolist(), strict=True))
    fitted = _with_rates(cost, values, unknowns)
    predicted = predict(fitted, timings, values)
    residual = np.log(predicted) - wanted
    freedom = max(len(wanted) - len(logs), 1)
    variance = np.linalg.pinv(jacobian.T @ jacobian).diagonal() * (residual @ residual) / freedom
    # A column of zeros means that no row depends on that unknown; the pseudo-inverse would call it certain.
    determined = np.abs(jacobian).max(axis=0) > 1e-9
    errors = np.where(determined, np.sqrt(variance), np.inf).tolist()
    return Fit(
        cost=fitted,
        lengths={name: values[name] for name in names},
        predicted=predicted,
        errors=predicted / np.exp(wanted) - 1,
        spread=dict(zip([*unknowns, *names], errors, strict=True)),
    )


def predict(cost: CostModel, timings: Sequence[Timing], lengths: dict[str, float] | None = None) -> np.ndarray:
    """Modelled seconds [timings]; no sample is longer than its pack."""
    seconds = []
    for row in timings:
        tokens = row.tier.packing_length
        named = isinstance(row.sample_tokens, str)
        length = (lengths or {})[row.sample_tokens] if named else row.sample_tokens or tokens  # type: ignore[index]
        squares = tokens * min(float(length), tokens)
        one = cost.tier_cost(row.tier)
        seconds.append(row.micro_batches * (one.fixed + one.per_token * tokens + one.per_square * squares))
    return np.array(seconds)


def _with_rates(cost: CostModel, values: dict[str, float], unknowns: Sequence[str]) -> CostModel:
    return replace(cost, **{name: values[name] for name in unknowns})  # type: ignore[arg-type]


def _least_squares(
    model: Callable[[np.ndarray], np.ndarray], start: np.ndarray, wanted: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """(argument of least squared error, Jacobian there)."""
    at, damping = start, 1e-2
    residual = model(at) - wanted
    jacobian = _jacobian(model, at)
    for _ in range(steps):
        square = jacobian.T @ jacobian
        move = np.linalg.solve(square + damping * np.eye(len(at)), -jacobian.T @ residual)
        move = np.clip(move, -1, 1)  # at most a factor of e at once
        trial = model(at + move) - wanted
        if trial @ trial < residual @ residual:
            at, residual, damping = at + move, trial, max(damping / 3, 1e-12)
            jacobian = _jacobian(model, at)
            if np.abs(move).max() < 1e-10:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return at, jacobian


def _jacobian(model: Callable[[np.ndarray], np.ndarray], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    columns = [(model(at + step * unit) - model(at - step * unit)) / (2 * step) for unit in np.eye(len(at))]
    return np.stack(columns, axis=1)
