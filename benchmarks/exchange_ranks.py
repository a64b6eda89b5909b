"""The ranks of `benchmarks.exchange`: count bytes, time steps, measure busy time. One gloo rank each."""

import dataclasses
import json
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_hbp.data.store import TokenStore  # noqa: E402
from megatron_hbp.feed.feed import Feed, MicroBatch  # noqa: E402
from megatron_hbp.feed.forward import make_forward_step  # noqa: E402
from megatron_hbp.model import context as micro_batch_context  # noqa: E402
from megatron_hbp.model.exchange.collectives import count_traffic  # noqa: E402
from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture  # noqa: E402
from megatron_hbp.planning.core import planfile  # noqa: E402
from megatron_hbp.planning.core.exchanges import usable  # noqa: E402
from megatron_hbp.planning.core.model import AttentionShape  # noqa: E402
from megatron_hbp.planning.core.tiers import Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402
from tests.equivalence.support.stepping import groups_of, laid_out  # noqa: E402

COUNTED_TOKENS = 64
"""Local tokens of a counted micro-batch: elements per token are the same for any number."""
NODE_SIZE = 4
"""Ranks that count as a node."""
TIMED_TOKENS, ROUNDS = 512, 5
"""Local tokens and rounds of the timed steps."""


def model_of(shape: AttentionShape, **changes: Any) -> list:
    """One layer with the heads and widths of `shape`; the hidden width is 64, which no exchange sees."""
    common: dict[str, Any] = {
        "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": shape.num_query_heads,
        "kv_channels": shape.qk_width, "dtype": torch.float32, "max_length": 8192, **changes,
    }  # fmt: skip
    if not shape.kv_latent:
        return build("dense", num_query_groups=shape.num_kv_heads, **common)
    return build(
        "moe", q_lora_rank=shape.q_latent, kv_lora_rank=shape.kv_latent, qk_head_dim=shape.qk_width - shape.rope_width,
        qk_pos_emb_head_dim=shape.rope_width, v_head_dim=shape.v_width, **common,
    )  # fmt: skip


def batch_of(exchange: str, cp_degree: int, local_tokens: int, groups: Any) -> MicroBatch:
    """This rank's part of a pack that one sample fills."""
    ranks = dist.get_world_size()
    store = MemoryStore.random([cp_degree * local_tokens] * (ranks // cp_degree), vocabulary=VOCABULARY)
    tier = Tier(packing_length=cp_degree * local_tokens, cp_degree=cp_degree, exchange=exchange)
    packs = [(0, 0, rank, 0, [rank // cp_degree]) for rank in range(0, ranks, cp_degree)]
    plan = plan_of(packs, tiers=[tier], lengths=store.lengths, num_ranks=ranks)
    feed = Feed(
        plan=plan, store=store, groups=groups, rank=dist.get_rank(), unit=1, full_length=False,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )  # fmt: skip
    return next(feed)


def forward(chunks: list, batch: MicroBatch) -> torch.Tensor:
    """The loss sum of a micro-batch."""
    losses, loss_sum = make_forward_step()(iter([batch]), chunks[0])
    return loss_sum(losses)[0]


def count_bytes(shapes: dict[str, AttentionShape], degrees: list[int]) -> list[dict[str, Any]]:
    """Elements received per local token in node and across nodes, every exchange, shape and degree; mean and most."""
    rows: list[dict[str, Any]] = []
    with laid_out():
        groups = groups_of(degrees)
        for name, shape in shapes.items():
            chunks = model_of(shape)
            for cp_degree in degrees:
                for exchange in usable(shape, cp_degree):
                    row = {"shape": name, "cp": cp_degree, "exchange": exchange.name}
                    rows.append(row | _counted(chunks, batch_of(exchange.name, cp_degree, COUNTED_TOKENS, groups)))
            del chunks
    return rows


def _counted(chunks: list, batch: MicroBatch) -> dict[str, Any]:
    """Forward and backward counted separately."""
    with count_traffic(NODE_SIZE) as there:
        loss = forward(chunks, batch)
    with count_traffic(NODE_SIZE) as back:
        loss.backward()
    chunks[0].zero_grad_buffer()
    per_token = 4.0 * COUNTED_TOKENS  # fp32: bytes received -> elements per local token
    found = torch.tensor([there.inside, there.outside, back.inside + back.outside]).double() / per_token
    every = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(every, found)
    table = torch.stack(every)  # [ranks, 3]
    mean, most = table.mean(0).tolist(), table.amax(0).tolist()
    total = (table[:, 0] + table[:, 1]).tolist()
    return {
        "inside": mean[0], "outside": mean[1], "most_outside": most[1], "backward": mean[2],
        "least": min(total), "most": max(total),
    }  # fmt: skip


def time_steps(shapes: dict[str, AttentionShape], degrees: list[int]) -> list[dict[str, Any]]:
    """Seconds of a forward and backward with each exchange, in turns: other load of the machine affects all alike."""
    rows = []
    with laid_out():
        groups = groups_of(degrees)
        for name, shape in shapes.items():
            chunks = model_of(shape, num_layers=2)
            for cp_degree in degrees:
                rows += _timed(name, shape, cp_degree, chunks, groups)
    return rows


def _timed(name: str, shape: AttentionShape, cp_degree: int, chunks: list, groups: Any) -> list[dict[str, Any]]:
    batches = {
        exchange.name: batch_of(exchange.name, cp_degree, TIMED_TOKENS, groups) for exchange in usable(shape, cp_degree)
    }
    seconds: dict[str, list[float]] = {exchange: [] for exchange in batches}
    for _ in range(ROUNDS + 1):
        for exchange, batch in batches.items():
            dist.barrier()
            started = time.perf_counter()
            forward(chunks, batch).backward()
            dist.barrier()  # the slowest rank's time
            seconds[exchange].append(time.perf_counter() - started)
            chunks[0].zero_grad_buffer()
    return [
        {"shape": name, "cp": cp_degree, "exchange": exchange, "seconds": found[1:]}
        for exchange, found in seconds.items()
        if found
    ]


def busy_times(folder: str, plans: list[str], num_steps: int) -> dict[str, Any]:
    """CPU seconds of this process in each micro-batch of the demo's dense model: {plan: [[step, slot, seconds]]}.

    A process that waits for others sleeps, so its CPU time is its work, without that of other users of the machine.
    """
    store = TokenStore.open(Path(folder) / "train")
    found = {}
    with laid_out():
        groups = groups_of((2, 4))
        chunks = build(
            "dense", dtype=torch.float32, max_length=8192, num_layers=2, hidden_size=128, ffn_hidden_size=384,
            num_attention_heads=4, num_query_groups=2, vocabulary=store.manifest.tokenizer.vocab_size,
        )  # fmt: skip
        for turn, name in enumerate((plans[0], *plans)):  # first one step to warm up, which is not kept
            plan = planfile.load(Path(folder) / f"{name}.plan")
            feed = Feed(
                plan=plan, store=store, groups=groups, rank=parallel_state.get_data_parallel_rank(), unit=1,
                full_length=False, device=torch.device("cpu"),
            )  # fmt: skip
            mine = _busy(chunks, feed, min(num_steps, plan.num_steps) if turn else 1)
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            found[name] = every
    return found


def _busy(chunks: list, feed: Feed, num_steps: int) -> list[list[float]]:
    marks: list[tuple[int, int, float]] = []

    def finalize(*args: Any, **kwargs: Any) -> None:
        marks.append((-1, -1, time.process_time()))  # the last micro-batch ends where the ranks synchronise
        finalize_model_grads(*args, **kwargs)

    chunks[0].module.config.finalize_model_grads_func = finalize
    step_function = make_forward_step(lambda b: marks.append((b.step, b.slot, time.process_time())))
    with micro_batch_context.on_bind(RecomputeSwitch(chunks)):
        for step in range(num_steps):
            chunks[0].zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=step_function, data_iterator=feed, model=chunks,
                num_microbatches=len(feed.slots(step)), seq_length=8192, micro_batch_size=1, forward_only=False,
            )  # fmt: skip
    return [[step, slot, after[2] - start] for (step, slot, start), after in pairwise(marks) if step >= 0]


def main(request: str, result_path: str) -> None:
    """Do what `request` (a JSON file) asks for."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    install_context_capture()
    asked = json.loads(Path(request).read_text())
    shapes = {name: AttentionShape(**shape) for name, shape in asked.get("shapes", {}).items()}
    result: Any
    if asked["what"] == "bytes":
        result = count_bytes(shapes, asked["degrees"])
    elif asked["what"] == "times":
        result = time_steps(shapes, asked["degrees"])
    else:
        result = busy_times(asked["data"], asked["plans"], asked["steps"])
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(result))
    dist.destroy_process_group()


def request_of(what: str, shapes: dict[str, AttentionShape], **rest: Any) -> str:
    """A request as JSON."""
    return json.dumps({"what": what, "shapes": {n: dataclasses.asdict(s) for n, s in shapes.items()}, **rest})


if __name__ == "__main__":
    main(*sys.argv[-2:])
