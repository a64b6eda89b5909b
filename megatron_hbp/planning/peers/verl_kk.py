"""verl's sequence balancing: one CP degree, Karmarkar-Karp on 24576 * s + s^2, twice.

Source: the description of verl's `balance_batch` and dynamic batch size (its documentation, "Performance Tuning Guide",
and the HybridFlow paper, arXiv 2409.19256); the constants are those of a dense block of width 4096, which verl uses for
every model. The degree is static: the least that holds the longest sample.

1. Each random global batch is split over the data-parallel gangs into equal counts of nearly equal cost.
2. Each gang splits its share into as many micro-batches as its tokens need; all gangs use the largest of these counts.
3. Micro-batches run in order of cost, costliest first, so that like ones stand side by side.

Gangs run equal numbers of micro-batches on sharded parameters, which is a barrier each: "lockstep".

Simplified: where Karmarkar-Karp overfills a micro-batch (it does not look at tokens; verl then runs beyond its token
limit), one more micro-batch is used, so that plans are valid. Batches need not divide by the gangs.
"""

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.peers.common import PlanWriter, random_steps, static_degree, unit_of
from megatron_hbp.planning.peers.differencing import karmarkar_karp
from megatron_hbp.planning.request import Request

LINEAR = 24576.0
"""Weight of a token against a squared token: 6 * 4096."""


def verl_kk(samples: Samples, request: Request) -> Plan:
    """Balance every random step over static gangs, then within each gang. See the head of this module."""
    lengths, unit = samples.lengths, unit_of(request)
    degree = static_degree(lengths, unit, request.num_ranks)
    num_gangs, capacity = request.num_ranks // degree, unit * degree
    work = LINEAR * lengths + lengths.astype(float) ** 2
    writer = PlanWriter(request=request)
    for step, ids in enumerate(random_steps(lengths, request.step_tokens, request.seed)):
        gang_of = karmarkar_karp(work[ids], num_gangs, equal_counts=True)
        shares = [ids[gang_of == gang] for gang in range(num_gangs)]
        micro_batches = split_shares(shares, work, lengths, capacity)
        for gang, parts in enumerate(micro_batches):
            for slot, part in enumerate(parts):
                writer.add(step=step, slot=slot, rank0=gang * degree, degree=degree, ids=part)
    return writer.plan(samples, schedule="lockstep")


def split_shares(
    shares: list[np.ndarray], work: np.ndarray, lengths: np.ndarray, capacity: int
) -> list[list[np.ndarray]]:
    """Micro-batches of each gang, costliest first: the least common count at which none exceeds `capacity` tokens."""
    count = max(-(-int(lengths[share].sum()) // capacity) for share in shares)
    while True:
        bins = [karmarkar_karp(work[share], count) for share in shares]
        fullest = max(
            np.bincount(bin_of, lengths[share]).max(initial=0) for bin_of, share in zip(bins, shares, strict=True)
        )
        if fullest <= capacity:
            break
        count += 1
    parts = [[share[bin_of == index] for index in range(count)] for bin_of, share in zip(bins, shares, strict=True)]
    return [sorted((part for part in gang if len(part)), key=lambda part: -work[part].sum()) for gang in parts]
