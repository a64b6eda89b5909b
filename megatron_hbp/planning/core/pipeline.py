"""Pipeline schedules, 1F1B and interleaved, run with micro-batches of unequal length over many steps at once.

Legend: p stages, v chunks of a stage (virtual stages), m micro-batches, n steps that are run side by side. Virtual
stage c p + s is chunk c of stage s. The order of a stage's passes is Megatron-LM's (megatron/core/pipeline_parallel/
schedules.py); a pass starts when its stage is free and its input has arrived. Nothing else is assumed, so that the
bubble of equal micro-batches, (p - 1) / (m v) of the work, comes out and is not put in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Pass = tuple[bool, int, int]
"""(is it a backward, chunk, micro-batch)."""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """One pass of one stage."""

    stage: int
    backward: bool
    chunk: int
    micro_batch: int
    start: np.ndarray
    """Seconds from the start of the step, float64 [n]."""
    end: np.ndarray
    """float64 [n]."""


def stage_orders(num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> list[list[Pass]]:
    """The passes of every stage in the order in which it does them."""
    return [_stage_order(stage, num_stages, num_micro_batches, num_chunks) for stage in range(num_stages)]


def _stage_order(stage: int, p: int, m: int, v: int) -> list[Pass]:
    total = m * v
    warm_up = p - stage - 1 if v == 1 else (p - stage - 1) * 2 + (v - 1) * p
    warm_up = min(warm_up, total)
    forwards = [(False, *_turn(turn, p, v)) for turn in range(total)]
    backwards = [(True, v - 1 - chunk, batch) for chunk, batch in (_turn(turn, p, v) for turn in range(total))]
    steady = [one for pair in zip(forwards[warm_up:], backwards, strict=False) for one in pair]
    return forwards[:warm_up] + steady + backwards[total - warm_up :]


def _turn(turn: int, p: int, v: int) -> tuple[int, int]:
    """(chunk, micro-batch) of a stage's pass number `turn`: p micro-batches through each chunk in turn."""
    if v == 1:
        return 0, turn
    block, inside = divmod(turn, p * v)
    return inside // p, block * p + inside % p


def run_pipeline(
    forward: np.ndarray, backward: np.ndarray, *, num_stages: int, num_chunks: int = 1, hop: np.ndarray | float = 0.0
) -> Iterator[PassTime]:
    """Yield every pass with its times. `forward` and `backward` [n, m] are seconds of the whole depth.

    Each of the p v chunks takes the same share of them. `hop` [n, m] or a number are the seconds that a micro-batch's
    activations take from one stage to the next. With v > 1, m must be a multiple of p.
    """
    p, v = num_stages, num_chunks
    n, m = forward.shape
    seconds = (forward / (p * v), backward / (p * v))
    hops = np.broadcast_to(np.asarray(hop, float), (n, m))
    orders = stage_orders(p, m, v)
    position = [0] * p
    free = [np.zeros(n) for _ in range(p)]
    done: dict[tuple[bool, int, int], np.ndarray] = {}
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                is_backward, chunk, batch = order[position[stage]]
                needs = _needs(is_backward, chunk * p + stage, p * v)
                if needs is not None and (*needs, batch) not in done:
                    break
                start = free[stage]
                if needs is not None:
                    moved = needs[1] % p != stage
                    start = np.maximum(start, done.pop((*needs, batch)) + (hops[:, batch] if moved else 0.0))
                end = start + seconds[is_backward][:, batch]
                free[stage] = done[(is_backward, chunk * p + stage, batch)] = end
                position[stage] += 1
                left -= 1
                yield PassTime(stage=stage, backward=is_backward, chunk=chunk, micro_batch=batch, start=start, end=end)
        assert left < before, "the schedule waits for itself"


def _needs(is_backward: bool, virtual: int, num_virtual: int) -> tuple[bool, int] | None:
    """(is it a backward, virtual stage) of the pass whose output this one takes in, None for the first forward."""
    if not is_backward:
        return (False, virtual - 1) if virtual else None
    return (True, virtual + 1) if virtual + 1 < num_virtual else (False, virtual)


def makespan(
    forward: np.ndarray, backward: np.ndarray, *, num_stages: int, num_chunks: int = 1, hop: np.ndarray | float = 0.0
) -> np.ndarray:
    """Seconds of each step, float64 [n]; arguments as in `run_pipeline`."""
    if num_stages == 1:
        return (forward + backward).sum(axis=1)
    last = np.zeros(len(forward))
    for one in run_pipeline(forward, backward, num_stages=num_stages, num_chunks=num_chunks, hop=hop):
        last = np.maximum(last, one.end)
    return last
