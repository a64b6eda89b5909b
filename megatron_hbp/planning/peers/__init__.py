"""Planners of others, written from their descriptions: to be compared with ours under one cost model.

Each module names its source and what it simplifies. Those here need numpy alone; `benchmarks/peers/` has two more,
which need megatron-core's scheduler and a MILP solver.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.peers.common import Peer
from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.skrull import skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.peers.verl_kk import verl_kk
from megatron_hbp.planning.schedule.placement import Request

Planner = Callable[[np.ndarray, Request], Plan]
"""Lengths int64 [n] and what is asked for -> a plan."""


def on_request(peer: Peer) -> Planner:
    """`peer` behind the signature of `hbp plan compare`: a rank holds what one rank of the shortest tier does.

    Where the cost model knows no memory, peers recompute as many layers as that tier (none where it names modules).
    """

    def planner(lengths: np.ndarray, request: Request) -> Plan:
        shortest, cost = request.tiers[0], request.cost
        if not cost.recompute_layers:
            cost = replace(cost, recompute_layers=((shortest.local_tokens, shortest.recompute.num_layers),))
        return peer(
            lengths, num_ranks=request.num_ranks, step_tokens=request.step_tokens, unit=shortest.local_tokens,
            cost=cost, seed=request.seed,
        )  # fmt: skip

    return planner


PEERS: dict[str, Planner] = {
    "static CP, tuned": on_request(static_cp),
    "dynamic CP (Megatron dev)": on_request(default_dynamic),
    "Skrull-style": on_request(skrull),
    "verl-style (Karmarkar-Karp)": on_request(verl_kk),
}
