"""Llama 3.1, after its published config.json."""

from megatron_hbp.families.flags import DECODER, Family

LLAMA_3_1 = Family(
    name="llama3.1",
    flags=(
        *DECODER,
        *("--norm-epsilon", "1e-5"),
        *("--rotary-base", "500000", "--use-rope-scaling", "--rope-scaling-factor", "8"),
    ),
)
