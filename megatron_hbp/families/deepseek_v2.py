"""DeepSeek-V2, compared with three public copies of its config.json.

A group of experts is scored by its best expert, as in the Hugging Face model, not by megatron-core's sum of its top
experts (model/router.py). One of the three copies has mscale 1.0 instead of 0.707: see your checkpoint's.
"""

from megatron_hbp.families.flags import DECODER, Family

DEEPSEEK_V2_FAMILY = Family(
    name="deepseek-v2",
    flags=(
        *DECODER,
        *("--norm-epsilon", "1e-6", "--qk-layernorm"),
        # YaRN from 4K to 160K
        *("--rope-type", "yarn", "--rotary-base", "10000", "--rotary-scaling-factor", "40"),
        *("--mscale", "0.707", "--mscale-all-dim", "0.707"),
        # 6 experts of 3 of 8 groups
        *("--moe-router-pre-softmax", "--moe-router-num-groups", "8", "--moe-router-group-topk", "3"),
        *("--moe-router-topk-scaling-factor", "16", "--moe-router-load-balancing-type", "none"),
        *("--moe-aux-loss-coeff", "0", "--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm"),
    ),
)
