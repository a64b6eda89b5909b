"""Sets of lengths that break planners, and the request that peers are called with."""

from typing import Any

import numpy as np

from megatron_hbp.planning import Plan, Request, Samples, Tier
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.request import Planner

UNIT, RANKS = 1024, 8
COST = preset("llama3.1-8b-h100")


def mixed(num_samples: int, seed: int) -> np.ndarray:
    """Short samples, and one in fifty of one to eight ranks."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.rint(60 * np.exp(rng.standard_normal(num_samples))), 1, UNIT)
    longs = rng.integers(UNIT, 8 * UNIT, max(1, num_samples // 50), endpoint=True)
    return rng.permutation(np.concatenate([lengths, longs])).astype(np.int64)


SETS = {
    "one short": np.array([7]),
    "one that takes all ranks": np.array([RANKS * UNIT]),
    "two": np.array([3 * UNIT, 1]),
    "all equal": np.full(50, 300),
    "all one rank": np.full(9, UNIT),
    "all longest": np.full(5, RANKS * UNIT),
    "boundaries": np.array([UNIT * c + d for c in (1, 2, 4) for d in (-1, 0, 1)] + [1] * 9),
    "all ones": np.ones(40, np.int64),
    "mixed": mixed(200, 0),
}


def plan_by(planner: Planner, lengths: np.ndarray, *, unit: int = UNIT, **changes: Any) -> Plan:
    """What `planner` makes of samples of these lengths, `unit` tokens on a rank."""
    defaults: dict[str, Any] = {"num_ranks": RANKS, "step_tokens": RANKS * UNIT, "cost": COST}
    request = Request(tiers=(Tier(packing_length=unit),), **defaults | changes)
    return planner(Samples.of(lengths), request)


def check_every_sample_once_within_memory(planner: Planner, lengths: np.ndarray) -> None:
    """Assert what must hold of a plan of any peer."""
    made = plan_by(planner, lengths)
    made.check()
    assert np.array_equal(np.sort(made.sample_ids), np.arange(len(lengths)))
    assert np.array_equal(made.lengths, lengths[made.sample_ids])
    assert (made.pack_tokens <= UNIT * made.pack_cp).all()
    assert not (made.pack_cp & (made.pack_cp - 1)).any()
