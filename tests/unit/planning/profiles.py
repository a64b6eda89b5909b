"""Profile rows made up from planted constants."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.core.model import dense_model
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.profile_table import Measurement, ProfileHeader, ProfileTable, Setting
from megatron_hbp.profiling.grid import parse_policies, settings

MODEL = dense_model("small", num_layers=4, hidden=512, num_heads=8, num_kv_heads=4, width=8192, vocabulary=100_000)
HEADER = ProfileHeader(
    device="CPU", versions={"torch": "0"}, model=MODEL, flags="0" * 64,
    layout={"world": 8, "data_parallel": 8, "tensor_parallel": 1, "pipeline_parallel": 1, "expert_parallel": 1,
            "node_size": 4},
    dtype="float32", exchange="a2a", supervised=1.0, logits_bytes=0.0, logits_rows=1024, memory="none",
)  # fmt: skip
PLANTED = CostModel(
    name="planted", model=MODEL, micro_batch_seconds=0.02,
    machine=Machine(name="CPU", linear_rate=1e12, attention_rate=2e11, node_bandwidth=1e9, cluster_bandwidth=2e8,
                    node_size=4),
    recompute_shares=(("core_attn", 0.0, 1.1), ("full", 0.9, 0.95)),
    recompute_seconds=(("core_attn", 0.001), ("full", 0.008)),
)  # fmt: skip


def row_of(setting: Setting, cost: CostModel = PLANTED, noise: float = 0.0, seed: int = 0) -> Measurement:
    """What `cost` would have measured."""
    seconds = float(cost.tier_cost(setting.tier).seconds(setting.tokens, setting.squares))
    return Measurement(
        tokens=setting.tokens, cp_degree=setting.cp_degree, recompute=setting.recompute, shape=setting.shape,
        squares=setting.squares, seconds=seconds * (1 + noise * np.random.default_rng(seed).standard_normal()),
        repeats=3, spread=0.01, peak_bytes=setting.local_tokens * (1000 - 200 * setting.policy.num_layers), fits=True,
    )  # fmt: skip


def table_of(rows: Sequence[Measurement], limit: float | None = None) -> ProfileTable:
    """A table under `HEADER`."""
    return replace(ProfileTable(header=HEADER), rows=tuple(rows), memory_limit=limit)


GRID = settings((1024, 4096, 8192, 16384), (1, 2, 4), parse_policies("none,full2,full4,sel=core_attn", 4), unit=1,
                most_local=4096)  # fmt: skip
"""What `profile_of` measured."""


def profile_of(limit: float | None = None, bytes_of: Callable[[Measurement], int] | None = None) -> ProfileTable:
    """A table of `GRID`; under a limit (bytes), rows take `bytes_of`."""
    rows = [row_of(setting) for setting in GRID]
    if limit is not None and bytes_of is not None:
        rows = [replace(row, peak_bytes=bytes_of(row)) for row in rows]
        rows = [replace(row, fits=bytes_of(row) <= limit) for row in rows]
    return table_of(rows, limit)


def saved_by_attention(row: Measurement) -> int:
    """Attention keeps much of a layer here: recomputing it alone saves two thirds of the bytes."""
    policy = row.setting.policy
    saved = 900 if policy.granularity == "selective" else 300 * policy.num_layers
    return row.setting.local_tokens * (1400 - saved)
