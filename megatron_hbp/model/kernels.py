"""Causal attention over the pieces of a pack, each piece alone: one signature, several kernels.

    kernel(q [t, h, d], k [u, m, d], v [u, m, dv], segments, scale) -> [t, h, dv]

where m divides h (grouped-query attention).

Piece i of the queries sees piece i of the keys, causal from the end: of more keys than queries, the first query sees
the surplus. `reference` is plain torch, any dtype, any device: the yardstick of the tests. The others are for CUDA in
fp16 and bf16: `te` (Transformer Engine), `flash` (flash-attn) and `varlen`, torch's own, which needs no extra package.
"""

import functools
import importlib.util
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_hbp.errors import ConfigError
from megatron_hbp.model.split import Segments

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float], torch.Tensor]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """One causal scaled_dot_product_attention a piece."""
    width = v.shape[2]
    if width < q.shape[2]:  # equal widths let torch take its flash path on CPU: no [n, n] matrix of an 8K sample
        v = F.pad(v, (0, q.shape[2] - width))
    copies = q.shape[1] // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    # split, not sliced: the backward of a slice fills and adds a tensor as long as the pack, for every piece
    sizes_q, sizes_k = ([b - a for a, b in pairwise(bounds)] for bounds in (segments.q, segments.k))
    pieces = zip(_split(q, sizes_q), _split(k, sizes_k), _split(v, sizes_k), strict=True)
    out = [_causal(one_q, one_k, one_v, scale) for one_q, one_k, one_v in pieces]
    return torch.cat(out, dim=2)[0].transpose(0, 1)[..., :width]


def _split(x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """[t, h, d] -> pieces [1, h, n, d]."""
    return x.transpose(0, 1)[None].split(sizes, dim=2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, h, n, d] and [1, h, m, d], m >= n; query i sees keys up to i + m - n."""
    n, m = q.shape[2], k.shape[2]
    if n == m:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    sees = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """torch.nn.attention.varlen: one launch for the whole pack."""
    from torch.nn.attention.varlen import varlen_attn

    width = v.shape[2]
    if width < q.shape[2]:
        v = F.pad(v, (0, q.shape[2] - width))
    out = varlen_attn(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, scale=scale, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out[..., :width]


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """flash-attn's varlen entry (2.1 and later align causal pieces at their ends)."""
    from flash_attn import flash_attn_varlen_func

    width = v.shape[2]
    if width < q.shape[2]:
        v = F.pad(v, (0, q.shape[2] - width))
    out = flash_attn_varlen_func(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, softmax_scale=scale, causal=True
    )
    return out[..., :width]


def te(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """Transformer Engine's DotProductAttention on packed tokens; it knows value heads of another width (MLA)."""
    attend = _te_attention(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale)
    aligned_at_ends = segments.q != segments.k
    out = attend(
        q.contiguous(), k.contiguous(), v.contiguous(), qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right" if aligned_at_ends else "padding_causal",
        cu_seqlens_q=segments.cu_q, cu_seqlens_kv=segments.cu_k,
        max_seqlen_q=segments.max_q, max_seqlen_kv=segments.max_k,
    )  # fmt: skip
    return out.view(q.shape[0], q.shape[1], v.shape[2])


@functools.cache
def _te_attention(heads: int, kv_heads: int, qk_width: int, v_width: int, scale: float) -> torch.nn.Module:
    """A module without parameters; heads differ from exchange to exchange."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, (qk_width, v_width), num_gqa_groups=kv_heads, attention_dropout=0.0, qkv_format="thd",
        softmax_scale=scale,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {"te": te, "flash": flash, "varlen": varlen, "reference": reference}
"""In the order in which `select` tries them."""
PACKAGES = {"te": "transformer_engine", "flash": "flash_attn"}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel `name` cannot run here; None where it can."""
    if name == "reference":
        return None
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"it needs CUDA and half precision, not {device.type} and {str(dtype).removeprefix('torch.')}"
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


@functools.cache
def select(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel `name`; for "auto" the first of `KERNELS` that can run.

    Raises:
        ConfigError: the named kernel cannot run here.
    """
    if name == "auto":
        name = next(known for known in KERNELS if why_not(known, device, dtype) is None)
    elif why := why_not(name, device, dtype):
        raise ConfigError(
            f"attention kernel {name} cannot be used: {why}; leave it out, or give --hbp-kernel reference"
        )
    return KERNELS[name]
