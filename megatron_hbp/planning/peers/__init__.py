"""Planners of others, written from their descriptions: to be compared with ours under one cost model.

Each module names its source and what it simplifies. Those here need numpy alone; `benchmarks/peers/` has two more,
which need megatron-core's scheduler and a MILP solver.
"""

from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.skrull import skrull
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.peers.verl_kk import verl_kk
from megatron_hbp.planning.request import Planner

PEERS: dict[str, Planner] = {
    "static CP, tuned": static_cp,
    "dynamic CP (Megatron dev)": default_dynamic,
    "Skrull-style": skrull,
    "verl-style (Karmarkar-Karp)": verl_kk,
}
