"""Attention kernels and recompute policies on a CUDA device.

    python -m benchmarks.gpu_attention [--write benchmarks/gpu_attention.md]

Three questions: is the time of variable-length attention proportional to summed squares, as the cost model assumes;
how far is each kernel from the best one of the same run (target 97%); what do recompute policies cost and save on a
stack of layers of the 1B class from 4K to 64K tokens. Without a device it prints a message and exits with code 78.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_hbp.model import kernels
from megatron_hbp.model.split import Segments
from megatron_hbp.planning.core.tiers import Recompute, full_layers

ROUNDS = 20
TARGET = 0.97
"""Share of the best kernel's rate."""
SHAPES = {
    "Llama-3.1-8B: 32 q, 8 KV, 128": (32, 8, 128, 128),
    "DeepSeek-V2 at CP 8: 16 heads, 192, 128": (16, 16, 192, 128),
}
"""Query heads, KV heads, width of queries and keys, of values."""
TOKENS = 32_768
MIXES = {
    "1 x 32K": [32768], "2 x 16K": [16384] * 2, "8 x 4K": [4096] * 8, "32 x 1K": [1024] * 32, "128 x 256": [256] * 128,
    "16K + 64 x 256": [16384, *[256] * 64], "8K + 24 x 1K": [8192, *[1024] * 24],
}  # fmt: skip
"""Packs of 32K tokens."""
STACK = {
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
}
"""Layers of Llama-3.2-1B."""
LOCAL_TOKENS = (4096, 8192, 16384, 32768, 65536)


def main() -> int:
    """Print the tables; with --write also save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    write = parser.parse_args().write
    if not torch.cuda.is_available():
        print("benchmarks.gpu_attention requires a CUDA device and found none; run it on a GPU", file=sys.stderr)
        return 78
    console = Console(width=120, record=True)
    console.print(f"$ python -m benchmarks.gpu_attention  # {torch.cuda.get_device_name()}", highlight=False)
    for table in (*(attention_table(name) for name in SHAPES), recompute_table()):
        console.print(table)
    if write:
        write.write_text(f"# On a CUDA device\n\n```text\n{console.export_text()}```\n", encoding="utf-8")
    return 0


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column is text."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def milliseconds(run: Callable[[], None], rounds: int = ROUNDS) -> float:
    """Median of the device's time for `run`, after two calls to warm up."""
    times = []
    for index in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index > 1:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


# ---------------------------------------------------------------- kernels


def installed() -> list[str]:
    """The kernels that run here, without `reference`, which makes one call per sample."""
    cuda = torch.device("cuda")
    return [n for n in kernels.KERNELS if n != "reference" and kernels.why_not(n, cuda, torch.bfloat16) is None]


def attention_table(shape: str) -> Table:
    """Forward and backward by kernel and mix of lengths, and how well summed squares explain the time."""
    names = installed()
    table = table_of(
        f"{shape}, bf16, {TOKENS:,} tokens, forward + backward, median of {ROUNDS} (target {TARGET:.0%} of the best)",
        "pack", "sum len^2", *(f"{name} ms" for name in names), *(f"{name} of the best" for name in names),
    )  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in names}
    squares = [float(sum(n * n for n in lengths)) for lengths in MIXES.values()]
    for (mix, lengths), square in zip(MIXES.items(), squares, strict=True):
        for name in names:
            times[name].append(attention_milliseconds(name, shape, lengths))
        best = min(times[name][-1] for name in names)
        shares = [best / times[name][-1] for name in names]
        table.add_row(
            mix, f"{square:.2e}", *(f"{times[n][-1]:.2f}" for n in names),
            *(f"{share:.1%}{'' if share >= TARGET else ' NO'}" for share in shares),
        )  # fmt: skip
    for name in names:
        slope, start = np.polyfit(squares, times[name], 1)
        residual = np.array(times[name]) - (slope * np.array(squares) + start)
        explained = 1 - residual.var() / np.var(times[name])
        table.add_row(f"{name}: {start:.2f} ms + {slope:.2e} ms x sum len^2, R^2 {explained:.4f}")
    return table


def attention_milliseconds(name: str, shape: str, lengths: list[int]) -> float:
    """One kernel on one pack."""
    heads, kv_heads, width, v_width = SHAPES[shape]
    device = torch.device("cuda")
    segments = Segments.of([0, *np.cumsum(lengths).tolist()], device=device)
    sizes = ((TOKENS, heads, width), (TOKENS, kv_heads, width), (TOKENS, kv_heads, v_width))
    q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in sizes)
    towards = torch.randn(TOKENS, heads, v_width, device=device, dtype=torch.bfloat16)
    kernel = kernels.KERNELS[name]
    return milliseconds(lambda: torch.autograd.backward(kernel(q, k, v, segments, width**-0.5), towards))


# ---------------------------------------------------------------- recompute


def policies() -> dict[str, Recompute]:
    """No recompute, selective policies, and full recompute of each quarter more of the layers."""
    layers = STACK["num_layers"]
    selective = {name: (name,) for name in ("core_attn", "layernorm", "mlp")}
    return {
        "none": Recompute(),
        **{name: Recompute(granularity="selective", modules=modules) for name, modules in selective.items()},
        "core_attn+layernorm": Recompute(granularity="selective", modules=("core_attn", "layernorm")),
        **{f"full {n}": full_layers(n) for n in range(layers // 4, layers + 1, layers // 4)},
    }


def recompute_table() -> Table:
    """Device time and reserved memory of a micro-batch by policy and local tokens; "-" where memory ran out."""
    from megatron.core import parallel_state

    from megatron_hbp.model.recompute import install_context_capture
    from tests.equivalence.support.models import build

    table = table_of(
        f"{STACK['num_layers']} layers of Llama-3.2-1B, bf16, one sample, CP 1, forward + backward: ms and GiB "
        "reserved above the model",
        "recompute", *(f"{n // 1024}K" for n in LOCAL_TOKENS),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        install_context_capture()
        changes = STACK | {"kv_channels": 64, "max_length": max(LOCAL_TOKENS), "use_cpu_initialization": False}
        model = build("dense", dtype=torch.bfloat16, **changes)[0]  # type: ignore[arg-type]
        for name, policy in policies().items():
            table.add_row(name, *(recompute_cell(model, policy, n) for n in LOCAL_TOKENS))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return table


def recompute_cell(model: torch.nn.Module, policy: Recompute, num_tokens: int) -> str:
    """Milliseconds and GiB of one policy and length."""
    from megatron_hbp.feed.forward import make_forward_step
    from megatron_hbp.feed.transfer import on_device
    from megatron_hbp.model.context import on_bind
    from megatron_hbp.model.recompute import RecomputeSwitch
    from tests.equivalence.support.models import VOCABULARY
    from tests.unit.model.packs import micro_batch_of

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    batch = on_device(micro_batch_of([num_tokens], recompute=policy, vocabulary=VOCABULARY), torch.device("cuda"))

    def run() -> None:
        losses, loss_sum = make_forward_step()(iter([batch]), model)
        loss_sum(losses)[0].backward()
        model.zero_grad_buffer()  # type: ignore[operator]

    try:
        with on_bind(RecomputeSwitch([model])):
            time = milliseconds(run, rounds=5)
    except torch.cuda.OutOfMemoryError:
        model.zero_grad_buffer()  # type: ignore[operator]
        return "-"
    return f"{time:,.0f} ms {(torch.cuda.max_memory_reserved() - before) / 2**30:.1f}"


if __name__ == "__main__":
    sys.exit(main())
