"""Profile rows made up from planted constants."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_hbp.planning.core.exchanges import AttentionShape
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.profile_table import ModelFacts, ProfileHeader, ProfileRow, ProfileTable, Setting

ATTENTION = AttentionShape(num_query_heads=8, num_kv_heads=4, qk_width=64, v_width=64)
HEADER = ProfileHeader(
    device="CPU", versions={"torch": "0"},
    model=ModelFacts(num_layers=4, linear_flops=6e8, attention_flops=8 * 128 * 4.0, attention=ATTENTION),
    flags="0" * 64,
    layout={"world": 8, "data_parallel": 8, "tensor_parallel": 1, "pipeline_parallel": 1, "expert_parallel": 1,
            "node_size": 4},
    dtype="float32", exchange="a2a", supervised=1.0, logits_bytes=0.0, logits_rows=1024, memory="none",
)  # fmt: skip
PLANTED = CostModel(
    name="planted", num_layers=4, linear_flops=6e8, attention_flops=8 * 128 * 4.0, attention=ATTENTION,
    linear_rate=1e12, attention_rate=2e11, node_bandwidth=1e9, cluster_bandwidth=2e8, micro_batch_seconds=0.02,
    node_size=4, max_cp_degree=8, recompute_shares=(("core_attn", 0.0, 1.1), ("full", 0.9, 0.95)),
    recompute_seconds=(("core_attn", 0.001), ("full", 0.008)),
)  # fmt: skip


def row_of(setting: Setting, cost: CostModel = PLANTED, noise: float = 0.0, seed: int = 0) -> ProfileRow:
    """What `cost` would have measured."""
    seconds = float(cost.tier_cost(setting.tier).seconds(setting.tokens, setting.squares))
    return ProfileRow(
        tokens=setting.tokens, cp_degree=setting.cp_degree, recompute=setting.recompute, shape=setting.shape,
        squares=setting.squares, seconds=seconds * (1 + noise * np.random.default_rng(seed).standard_normal()),
        repeats=3, spread=0.01, peak_bytes=setting.local_tokens * (1000 - 200 * setting.policy.num_layers), fits=True,
    )  # fmt: skip


def table_of(rows: Sequence[ProfileRow], limit: float | None = None) -> ProfileTable:
    """A table under `HEADER`."""
    return replace(ProfileTable(header=HEADER), rows=tuple(rows), memory_limit=limit)
