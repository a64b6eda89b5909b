"""Memory and time of the run time's components, in one run on CPU.

    python -m benchmarks.runtime [--write benchmarks/runtime.md]

Bytes are the same on every machine; times are medians and depend on its load. Saved bytes are those of all distinct
storages that autograd still holds when the forward has ended (torch.autograd.graph.saved_tensors_hooks), without
parameters. Peak bytes are the highest sum of all allocations and releases that torch's own allocator reports
(torch.profiler, profile_memory), forward and backward, above what was allocated before.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from megatron_hbp.feed.feed import MicroBatch  # noqa: E402
from megatron_hbp.feed.forward import make_forward_step  # noqa: E402
from megatron_hbp.model import loss  # noqa: E402
from megatron_hbp.model.context import bind, on_bind  # noqa: E402
from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, full_layers  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build, transformer_config  # noqa: E402
from tests.launching import launch  # noqa: E402
from tests.unit.model.packs import context_of, micro_batch_of  # noqa: E402

MIB = 2**20
LAYERS, LENGTHS = 4, [256, 150, 350, 18, 250]
"""The recompute table's models and pack: 4 layers, 1,024 tokens."""
SIZES = {
    "dense": {"hidden_size": 256, "ffn_hidden_size": 768},
    "moe": {"hidden_size": 256, "ffn_hidden_size": 768, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_head_dim": 32,
            "qk_pos_emb_head_dim": 16, "v_head_dim": 32, "moe_ffn_hidden_size": 192,
            "moe_shared_expert_intermediate_size": 384},
}  # fmt: skip
MODULES = {
    "dense": ("core_attn", "layernorm", "mlp"),
    "moe": ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
}
BIND_TARGET = 50.0
"""Microseconds."""


def main() -> None:
    """Print the tables; with --write also save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    write = parser.parse_args().write
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        install_context_capture()
        tables = [*(recompute_table(kind) for kind in SIZES), logits_table(), bind_table(), groups_table(Path(folder))]
        dist.destroy_process_group()
    console = Console(width=110, record=True)
    console.print("$ python -m benchmarks.runtime --write benchmarks/runtime.md", highlight=False)
    for table in tables:
        console.print(table)
    if write:
        write.write_text(f"# The run time in figures\n\n```text\n{console.export_text()}```\n", encoding="utf-8")


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column is text."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


# ---------------------------------------------------------------- recompute


def policies(kind: str) -> dict[str, Recompute]:
    """No recompute, each selective module, all modules that do not nest, full with 1 to all layers."""
    together = [name for name in MODULES[kind] if name not in ("mlp", "moe")]
    return {
        "none": Recompute(),
        **{name: Recompute(granularity="selective", modules=(name,)) for name in MODULES[kind]},
        "+".join(together): Recompute(granularity="selective", modules=tuple(together)),
        **{f"full, {n} of {LAYERS}": full_layers(n) for n in range(1, LAYERS + 1)},
    }


def recompute_table(kind: str) -> Table:
    """Saved bytes and time of a forward and backward by policy, fp32."""
    model = build(kind, dtype=torch.float32, num_layers=LAYERS, **SIZES[kind])[0]  # type: ignore[arg-type]
    model.train()
    table = table_of(
        f"{kind}: {LAYERS} layers, hidden 256, one pack of {sum(LENGTHS):,} tokens, CP 1, fp32, median of 5",
        "recompute", "saved MiB", "of none", "forward + backward", "of none",
    )  # fmt: skip
    batches = {
        name: micro_batch_of(LENGTHS, recompute=policy, vocabulary=VOCABULARY)
        for name, policy in policies(kind).items()
    }
    with on_bind(RecomputeSwitch([model])):
        saved = {name: saved_bytes(model, batch) for name, batch in batches.items()}
        times: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(5):  # in turns: other load of the machine affects all policies alike
            for name, batch in batches.items():
                times[name].append(seconds(partial(forward_backward, model, batch)))
    median = {name: statistics.median(each) for name, each in times.items()}
    for name in batches:
        table.add_row(
            name, f"{saved[name] / MIB:.2f}", f"{saved[name] / saved['none']:.0%}",
            f"{median[name] * 1e3:.0f} ms", f"{median[name] / median['none']:.0%}",
        )  # fmt: skip
    return table


def forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The loss sum of a micro-batch."""
    losses, loss_sum = make_forward_step()(iter([batch]), model)
    return loss_sum(losses)[0]


def forward_backward(model: torch.nn.Module, batch: MicroBatch) -> None:
    """Both passes of a micro-batch."""
    forward(model, batch).backward()


def saved_bytes(model: torch.nn.Module, batch: MicroBatch) -> int:
    """What autograd holds between forward and backward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = forward(model, batch)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    total.backward()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---------------------------------------------------------------- logits


def logits_table() -> Table:
    """Peak bytes of vocabulary projection and cross-entropy, forward and backward."""
    table = table_of(
        "Output projection and cross-entropy, forward + backward, hidden 64, fp32, half of the tokens supervised",
        "tokens x vocabulary", "rows", "chunk", "logits of all tokens MiB", "peak MiB", "seconds",
    )  # fmt: skip
    rows_of = {"all": lambda n: n, "supervised": lambda n: n // 2}
    for tokens, words, rows, chunk in (
        (4096, 32768, "all", None),
        (4096, 32768, "supervised", None),
        (4096, 32768, "supervised", loss.CHUNK_ROWS),
        (4096, 32768, "supervised", 256),
        (16384, 131072, "supervised", loss.CHUNK_ROWS),
    ):
        peak, wall = logits_peak(tokens, words, rows_of[rows](tokens), chunk or tokens)
        table.add_row(
            f"{tokens:,} x {words:,}", rows, f"{chunk:,}" if chunk else "none", f"{tokens * words * 4 / MIB:,.0f}",
            f"{peak / MIB:,.0f}", f"{wall:.1f}",
        )  # fmt: skip
    return table


def logits_peak(tokens: int, words: int, num_rows: int, chunk: int) -> tuple[int, float]:
    """Peak bytes above the start, and seconds."""
    config = transformer_config("dense", params_dtype=torch.float32, hidden_size=64)
    layer = tensor_parallel.ColumnParallelLinear(
        64, words, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
    )
    hidden = torch.randn(tokens, 1, 64, requires_grad=True)
    rows = loss.LossRows(
        local=torch.arange(tokens - num_rows, tokens), labels=torch.randint(0, words, (num_rows,)), rows_to=(),
        rows_from=(), cp_group=None,
    )  # fmt: skip

    def run() -> None:
        losses = loss.supervised_token_losses(
            hidden_states=hidden, output_layer=layer, output_weight=None, context=rows, scale_logits=lambda x: x
        )
        losses.sum().backward()

    with mock.patch.object(loss, "CHUNK_ROWS", chunk):
        return peak_bytes(run)


def peak_bytes(run: Callable[[], None]) -> tuple[int, float]:
    """Highest sum of what torch's CPU allocator handed out while `run` ran, and its seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        wall = seconds(run)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, wall


# ---------------------------------------------------------------- binding, groups


def bind_table() -> Table:
    """Microseconds of making a micro-batch current and undoing it, by what changes in its recompute policy."""
    table = table_of(
        f"Binding a micro-batch, 32 layers, median of 10,000 (target < {BIND_TARGET:g} us)",
        "model", "policy", "flags", "us", "met",
    )  # fmt: skip
    for kind in SIZES:
        switch = RecomputeSwitch(build(kind, dtype=torch.float32, num_layers=32))
        every = context_of([8, 8], recompute=list(policies(kind).values())[len(MODULES[kind]) + 1])
        full, other = (context_of([8, 8], recompute=full_layers(count)) for count in (20, 7))
        with on_bind(switch):
            for name, contexts in {
                "already set": (full, full),
                "another number of layers": (full, other),
                "selective and full alternating": (every, full),
            }.items():
                times = []
                for index in range(10_000):
                    context = contexts[index % 2]
                    start = time.perf_counter_ns()
                    with bind(context):
                        pass
                    times.append(time.perf_counter_ns() - start)
                median = statistics.median(times) / 1e3
                table.add_row(
                    kind, name, str(len(switch._owners)), f"{median:.1f}", "yes" if median < BIND_TARGET else "NO"
                )
    return table


def groups_table(folder: Path) -> Table:
    """Process groups at start-up and during ten steps with CP 1, 2 and 4 on 4 ranks."""
    ranks = launch("tests.unit.parallel.worker", ranks=4, tmp_path=folder)
    table = table_of("Process groups on 4 ranks, MoE, CP degrees 1, 2, 4 mixed in each step", "what", "per rank")
    table.add_row("CP communicators made at start-up", ", ".join(str(r["dp4"]["num_created"]) for r in ranks))
    table.add_row("dist.new_group calls in 10 steps", ", ".join(str(r["steps"]["calls"]) for r in ranks))
    table.add_row("further groups known to torch after them", ", ".join(str(r["steps"]["known"]) for r in ranks))
    return table


if __name__ == "__main__":
    main()
