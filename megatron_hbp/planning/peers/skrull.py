"""Skrull: within each micro-batch long samples are spread over the static CP group, short ones stay on one rank.

Source: Xu et al., "Skrull: Towards Efficient Long Context Fine-tuning through Dynamic Data Scheduling", arXiv
2505.19609: global data scheduling (GDS) and distribution-aware context parallelism (DACP), from the paper's text. The
group's degree is static: the least that holds the longest sample.

GDS   Each random global batch is spread over the data-parallel gangs by FLOPs, the costliest sample to the gang
      with least. A gang cuts its share into the fewest micro-batches that its memory allows, each sample, longest
      first, to the one with the fewest tokens, so that each holds long and short ones.
DACP  A sample over `unit` tokens is distributed: each rank of the gang gets 1 / CP of it. The others, longest first,
      are local to the rank with the fewest FLOPs that has room. Where no rank has room, the sample is distributed too,
      and where even that does not fit, the gang tries with one micro-batch more.

Gangs meet once a step (the paper minimises the slowest gang's sum over its micro-batches): "gang".

Simplified: roll-back distributes the sample at hand, not one placed before; FLOPs are those of our cost model, without
exchange. A plan knows no pack that is part distributed, part local, so these are two packs in consecutive slots; Skrull
runs them in one forward and pays the fixed cost of a micro-batch once, as benchmarks/peers/measure.py charges it. Its
overlap of the exchange with local work is not modelled (it could hide what distributed samples exchange).
"""

import heapq

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.peers.common import (
    PlanWriter,
    cost_of,
    random_steps,
    static_degree,
    tier_of_degree,
    unit_of,
)
from megatron_hbp.planning.request import Request

MicroBatch = tuple[list[int], list[list[int]]]
"""Samples distributed over the gang, and samples local to each of its ranks."""


def skrull(samples: Samples, request: Request) -> Plan:
    """Schedule every random step by GDS and DACP. See the head of this module."""
    lengths, unit, cost = samples.lengths, unit_of(request), cost_of(request)
    degree = static_degree(lengths, unit, request.num_ranks)
    num_gangs = request.num_ranks // degree
    rank_cost = cost.tier_cost(tier_of_degree(1, unit, cost))
    flops = rank_cost.per_token * lengths + rank_cost.per_square * lengths.astype(float) ** 2
    writer = PlanWriter(request=request)
    for step, ids in enumerate(random_steps(lengths, request.step_tokens, request.seed)):
        ordered = ids[np.argsort(-lengths[ids], kind="stable")]
        shares = deal_by_cost(ordered, flops, num_gangs)
        for gang, share in enumerate(shares):
            slot = 0
            for distributed, local in cut_share(share, lengths, flops, degree, unit):
                slot = _write(writer, step, slot, gang * degree, distributed, local)
    return writer.plan(samples, schedule="gang")


def deal_by_cost(ordered: np.ndarray, costs: np.ndarray, num_parts: int) -> list[list[int]]:
    """Samples in order, each to the part that costs least so far: the samples of each part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0.0, part) for part in range(num_parts)]
    for sample, cost in zip(ordered.tolist(), costs[ordered].tolist(), strict=True):
        load, part = loads[0]
        parts[part].append(sample)
        heapq.heapreplace(loads, (load + cost, part))
    return parts


def cut_share(share: list[int], lengths: np.ndarray, flops: np.ndarray, degree: int, unit: int) -> list[MicroBatch]:
    """The fewest micro-batches of one gang's samples, longest first in `share`, that all fit."""
    count = -(-int(lengths[share].sum()) // (unit * degree))
    while True:
        parts = deal_by_cost(np.array(share, np.int64), lengths, count)
        placed = [micro_batch for part in parts if (micro_batch := place(part, lengths, flops, degree, unit))]
        if len(placed) == count:
            return placed
        count += 1


def place(samples: list[int], lengths: np.ndarray, flops: np.ndarray, degree: int, unit: int) -> MicroBatch | None:
    """DACP for one micro-batch, `samples` longest first; None where they do not fit."""
    distributed: list[int] = []
    local: list[list[int]] = [[] for _ in range(degree)]
    rooms, loads = np.full(degree, float(unit)), np.zeros(degree)
    for sample in samples:
        length = int(lengths[sample])
        fits = np.flatnonzero(rooms >= length)
        if length <= unit and len(fits):
            rank = int(fits[loads[fits].argmin()])
            local[rank].append(sample)
            rooms[rank] -= length
            loads[rank] += flops[sample]
        elif rooms.min() >= length / degree:
            distributed.append(sample)
            rooms -= length / degree
            loads += flops[sample] / degree
        else:
            return None
    return distributed, local


def _write(writer: PlanWriter, step: int, slot: int, rank0: int, distributed: list[int], local: list[list[int]]) -> int:
    """Write one micro-batch from `slot` on; returns the next slot of the gang."""
    degree = len(local)
    if distributed:
        writer.add(step=step, slot=slot, rank0=rank0, degree=degree, ids=distributed)
        slot += 1
    for rank, ids in enumerate(local):
        if ids:
            writer.add(step=step, slot=slot, rank0=rank0 + rank, degree=1, ids=ids)
    return slot + any(map(bool, local))
