"""For `hbp plan compare --peers benchmarks/peers/plug_in.py`: the peers of this folder behind that command's signature.

FlexSP is left out: its program takes seconds a step (`python -m benchmarks.peers.run` plans a few steps with it).
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.balanced_cp import balanced_cp
from benchmarks.peers.common import Peer
from benchmarks.peers.default_dynamic import default_dynamic
from benchmarks.peers.skrull import skrull
from benchmarks.peers.static_cp import static_cp
from benchmarks.peers.verl_kk import verl_kk
from megatron_hbp.planning.layout import Request
from megatron_hbp.planning.plan import Plan


def on_request(peer: Peer) -> Callable[[np.ndarray, Request], Plan]:
    """`peer` as a function of lengths and a request: a rank holds what one rank of the shortest tier does."""

    def planner(lengths: np.ndarray, request: Request) -> Plan:
        return peer(
            lengths, num_ranks=request.num_ranks, step_tokens=request.step_tokens, unit=request.tiers[0].local_tokens,
            cost=request.cost, seed=request.seed,
        )  # fmt: skip

    return planner


PLANNERS = {
    "peer: static CP, tuned": on_request(static_cp),
    "peer: BalancedCPScheduler (megatron-core wheel)": on_request(balanced_cp),
    "peer: default_dynamic_cp (Megatron dev)": on_request(default_dynamic),
    "peer: Skrull": on_request(skrull),
    "peer: verl, Karmarkar-Karp": on_request(verl_kk),
}
