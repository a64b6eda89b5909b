"""Fit a cost model's rates to measured iteration times: least squares on log(seconds), by Gauss-Newton, numpy alone.

The unknowns are positive and span fifteen orders of magnitude, so their logarithms are fitted; so are the times, since
an error of 5% weighs the same in a short and a long row. Steps are damped (Levenberg-Marquardt), the Jacobian is taken
by central differences: seven unknowns and sixteen rows need no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel

MACHINE_RATES = ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth")
RATES = (*MACHINE_RATES, "micro_batch_seconds")
"""What a fit may change: rates of the cost model's machine, and its fixed seconds."""


def rates_of(cost: CostModel) -> dict[str, float]:
    """The values of `RATES` in `cost`."""
    return {name: getattr(cost.machine if name in MACHINE_RATES else cost, name) for name in RATES}


def with_rates(cost: CostModel, rates: Mapping[str, float]) -> CostModel:
    """`cost` with other values for some of `RATES`."""
    fixed = rates.get("micro_batch_seconds", cost.micro_batch_seconds)
    machine = {name: value for name, value in rates.items() if name in MACHINE_RATES}
    return replace(cost.with_machine(**machine), micro_batch_seconds=fixed)


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
    """Fit `unknowns` (of `RATES`) and the named sample lengths. Raises DataError with too few rows."""
    names = sorted({row.sample_tokens for row in timings if isinstance(row.sample_tokens, str)})
    if len(timings) < len(unknowns) + len(names):
        raise DataError(f"{len(timings)} timings cannot determine {len(unknowns) + len(names)} unknowns; time more")
    measured = np.log([row.seconds for row in timings])

    def fitted(values: dict[str, float]) -> CostModel:
        return with_rates(cost, {name: values[name] for name in unknowns})

    def model(logs: np.ndarray) -> np.ndarray:
        values = dict(zip([*unknowns, *names], np.exp(logs).tolist(), strict=True))
        return np.log(predict(fitted(values), timings, values))

    start = rates_of(cost)
    logs = np.log([*(start[name] for name in unknowns), *(8192.0 for _ in names)])
    logs, jacobian = _least_squares(model, logs, measured, steps)
    values = dict(zip([*unknowns, *names], np.exp(logs).tolist(), strict=True))
    predicted = predict(fitted(values), timings, values)
    residual = np.log(predicted) - measured
    freedom = max(len(measured) - len(logs), 1)
    variance = np.linalg.pinv(jacobian.T @ jacobian).diagonal() * (residual @ residual) / freedom
    # A column of zeros means that no row depends on that unknown; the pseudo-inverse would call it certain.
    determined = np.abs(jacobian).max(axis=0) > 1e-9
    errors = np.where(determined, np.sqrt(variance), np.inf).tolist()
    return Fit(
        cost=fitted(values),
        lengths={name: values[name] for name in names},
        predicted=predicted,
        errors=predicted / np.exp(measured) - 1,
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
        seconds.append(row.micro_batches * cost.tier_cost(row.tier).seconds(tokens, squares))
    return np.array(seconds)


def _least_squares(
    model: Callable[[np.ndarray], np.ndarray], start: np.ndarray, measured: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """(argument of least squared error, Jacobian there)."""
    at, damping = start, 1e-2
    residual = model(at) - measured
    jacobian = _jacobian(model, at)
    for _ in range(steps):
        square = jacobian.T @ jacobian
        move = np.linalg.solve(square + damping * np.eye(len(at)), -jacobian.T @ residual)
        move = np.clip(move, -1, 1)  # at most a factor of e at once
        trial = model(at + move) - measured
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
