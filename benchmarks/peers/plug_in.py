"""For `hbp plan compare --peers benchmarks/peers/plug_in.py`: the scheduler in megatron-core's wheel.

FlexSP is left out: its program takes seconds per step (`python -m benchmarks.peers.run` plans a few steps with it).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.balanced_cp import balanced_cp
from megatron_hbp.planning.request import Planner

PLANNERS: dict[str, Planner] = {"BalancedCPScheduler (megatron-core wheel)": balanced_cp}
