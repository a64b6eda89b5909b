"""Multi-head latent attention whose queries have no latent (DeepSeek-V2-Lite: `q_lora_rank` None).

--qk-layernorm norms the latents: that of keys and values, and that of the queries where there is one. Where there is
none, megatron-core 0.19.2 norms the *hidden states* once more before the query projection (Transformer Engine), which
DeepSeek-V2-Lite does not, or refuses to build at all (its local layer spec).
"""

import copy
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class PlainQueryMLASelfAttention(MLASelfAttention):
    """Megatron-LM's MLA with a norm on the latent of keys and values only; nothing but the choice of parts is ours."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Classes of norms and projections; the query projection is the spec's own, no norm is fused to it.

        Megatron-LM's resolver is asked as if queries had a latent: it then settles keys and values alone. What it says
        of the query's latent is not built.
        """
        with_latent = copy.copy(self.config)
        with_latent.q_lora_rank = self.config.kv_lora_rank
        classes = QKNormConfigResolver(with_latent, submodules).resolve()
        return {**classes, "linear_q_proj": submodules.linear_q_proj, "q_layernorm": IdentityOp}
