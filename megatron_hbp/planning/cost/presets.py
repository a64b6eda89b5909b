"""Cost models that are shipped: fitted by hand to tables 4, 18 and 19 of the paper (arXiv 2503.07680).

Profile your own cluster for better ones (`hbp profile`).
"""

from dataclasses import replace

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import H100
from megatron_hbp.planning.core.model import AttentionShape, FeedForward, Layer, ModelSpec, dense_model
from megatron_hbp.planning.cost.model import CostModel

LLAMA_8B = dense_model(
    "llama3.1-8b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, width=14336, vocabulary=128256
)
LLAMA_70B = dense_model(
    "llama3.1-70b", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, width=28672, vocabulary=128256
)
QWEN_32B = dense_model(
    "qwen2.5-32b", num_layers=64, hidden=5120, num_heads=40, num_kv_heads=8, width=27648, vocabulary=152064
)
_MLA = AttentionShape(
    num_query_heads=128, num_kv_heads=128, qk_width=192, v_width=128, q_latent=1536, kv_latent=512, rope_width=64
)
DEEPSEEK_V2 = ModelSpec(
    name="deepseek-v2",
    hidden=5120,
    vocabulary=102400,
    layers=(
        (1, Layer(attention=_MLA, feed_forward=FeedForward(width=12288))),
        (
            59,
            Layer(
                attention=_MLA,
                feed_forward=FeedForward(width=1536, num_experts=160, experts_per_token=6, shared_width=3072),
            ),
        ),
    ),
)

PRESETS: dict[str, CostModel] = {
    cost.name: cost
    for cost in (
        CostModel(
            name="llama3.1-8b-h100", model=LLAMA_8B, machine=H100, micro_batch_seconds=0.188,
            recompute_layers=((2048, 0), (4096, 8), (8192, 23), (16384, 28)), recompute_ranks=32,
        ),
        # The 8B's rates; a tensor-parallel group counts as one rank.
        CostModel(
            name="llama3.1-70b-h100-tp8", model=LLAMA_70B, machine=H100, micro_batch_seconds=0.47, tensor_parallel=8
        ),
        CostModel(
            name="qwen2.5-32b-h100-tp4", model=QWEN_32B, machine=H100, micro_batch_seconds=0.376, tensor_parallel=4
        ),
        # 207e12 holds the all-to-all of EP 8 at 45 GB/s, 282 us per token; 385e12 and that all-to-all take as long.
        CostModel(
            name="deepseek-v2-h100", model=DEEPSEEK_V2,
            machine=replace(H100, linear_rate=207e12, attention_rate=200e12, node_bandwidth=45e9),
            micro_batch_seconds=0.3, step_seconds=0.5, linear_rate_without_experts=385e12,
        ),
    )
}  # fmt: skip
"""By name."""

DEFAULT_COST_MODEL = "llama3.1-8b-h100"


def preset(name: str) -> CostModel:
    """The shipped cost model `name`. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown cost model {name!r}; there are {', '.join(sorted(PRESETS))}, or a FILE.json of `hbp profile`"
        )
    return PRESETS[name]
