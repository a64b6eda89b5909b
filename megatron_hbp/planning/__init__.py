"""Offline, global, hashed plans: which samples run together, on which ranks, in which step. numpy only.

lengths --group_data--> tiers --pack, fill--> packs --balance--> slots --shuffle--> steps = Plan --save--> file
"""

from megatron_hbp.planning.core.plan import DataFingerprint, Pack, Plan
from megatron_hbp.planning.core.planfile import check_data, load, save
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Recompute, Tier, parse_tiers
from megatron_hbp.planning.planner import make_plan, naive_plan
from megatron_hbp.planning.request import Request

__all__ = [
    "DataFingerprint",
    "Pack",
    "Plan",
    "Recompute",
    "Request",
    "Samples",
    "Tier",
    "check_data",
    "load",
    "make_plan",
    "naive_plan",
    "parse_tiers",
    "save",
]
