"""Runs on 4 gloo ranks: gradients of a step with mixed CP degrees against one sample at a time, in fp64.

The yardstick of the dense model is Megatron-LM's *own* model, untouched, fed one unpadded sample at a time. (Its local
core attention cannot be built for MLA, so there the yardstick is our model fed one sample at a time.) One figure a
case: the largest |g - g_ref| over all parameters, relative to the largest |g_ref| of the same parameter.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_hbp.feed import batch, feed, forward  # noqa: E402
from megatron_hbp.model import context as micro_batch_context  # noqa: E402
from megatron_hbp.model import loss  # noqa: E402
from megatron_hbp.model.exchange import a2a  # noqa: E402
from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture  # noqa: E402
from megatron_hbp.model.split import split_pack  # noqa: E402
from megatron_hbp.parallel.groups import CpGroups  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402

LENGTHS = [17, 5, 1, 40, 23, 2, 31, 9, 60, 33, 3, 12, 90, 70, 11, 8, 25, 150, 14]
TIERS: dict[str, tuple[Tier, ...]] = {
    "none": (Tier(packing_length=64), Tier(packing_length=128, cp_degree=2), Tier(packing_length=256, cp_degree=4)),
}
TIERS["mixed"] = tuple(
    Tier(packing_length=t.packing_length, cp_degree=t.cp_degree, recompute=r)
    for t, r in zip(
        TIERS["none"],
        (
            Recompute(granularity="full", num_layers=2),
            Recompute(),
            Recompute(granularity="selective", modules=("core_attn", "layernorm")),
        ),
        strict=True,
    )
)
# (step, slot, rank0, tier, samples): CP 1 everywhere, CP 2 twice, CP 4, then degrees mixed in a slot with an idle rank
PACKS = [
    (0, 0, 0, 0, [0, 1, 2]), (0, 0, 1, 0, [3, 4]), (0, 0, 2, 0, [5, 6, 7]), (0, 0, 3, 0, [8]),
    (0, 1, 0, 1, [9, 10, 11]), (0, 1, 2, 1, [12]),
    (0, 2, 0, 2, [17, 13, 14]),
    (0, 3, 0, 1, [15, 16]), (0, 3, 2, 0, [18]),
]  # fmt: skip


def main(result_path: str) -> None:
    """Run every case and write {case: relative error}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    install_context_capture()
    results: dict[str, float] = {}
    for kind in ("dense", "moe"):
        for ep in (1,) if kind == "dense" else (1, 2, 4):
            parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
            yard = yardstick(kind)
            for recompute, tiers in TIERS.items():
                results[f"{kind} ep{ep} recompute={recompute}"] = error(gradients(kind, tiers), yard)
            if ep == 1:
                for name, breakage in BREAKAGES.items():
                    with breakage():
                        results[f"{kind} broken: {name}"] = error(gradients(kind, TIERS["none"]), yard)
            if dist.get_rank() == 0:
                print(json.dumps(results, indent=1), flush=True)
            parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def gradients(kind: str, tiers: tuple[Tier, ...]) -> dict[str, torch.Tensor]:
    """Gradients of the one step of PACKS through our feed, forward step and Megatron-LM's schedule."""
    store = MemoryStore.random(LENGTHS, vocabulary=VOCABULARY)
    plan = plan_of(PACKS, tiers=tiers, lengths=store.lengths, num_ranks=4)
    groups = CpGroups.create((2, 4), parallel_state.get_data_parallel_group(), timedelta(minutes=1))
    chunks = build(kind)
    rank_feed = feed.Feed(
        plan=plan, store=store, groups=groups, rank=parallel_state.get_data_parallel_rank(),  # type: ignore[arg-type]
        unit=1, full_length=False, device=torch.device("cpu"),
        joint_recompute=parallel_state.get_expert_model_parallel_world_size() > 1,
    )  # fmt: skip
    chunks[0].zero_grad_buffer()
    with micro_batch_context.on_bind(RecomputeSwitch(chunks)):
        get_forward_backward_func()(
            forward_step_func=forward.make_forward_step(),
            data_iterator=rank_feed,
            model=chunks,
            num_microbatches=int(plan.num_micro_batches[0]),
            seq_length=256,
            micro_batch_size=1,
            forward_only=False,
        )
    return named_gradients(chunks)


def yardstick(kind: str) -> dict[str, torch.Tensor]:
    """Gradients of the mean token loss with every sample alone, unpadded, on every rank the same."""
    chunks = build(kind, packed=kind == "moe")
    chunks[0].zero_grad_buffer()
    num_tokens = torch.zeros((), dtype=torch.int)
    for tokens, mask in MemoryStore.random(LENGTHS, vocabulary=VOCABULARY).samples:
        n = len(tokens)
        inputs, positions = torch.from_numpy(tokens)[None], torch.arange(n)[None]
        if kind == "dense":
            causal = torch.ones(1, 1, n, n).triu(1).bool()
            logits = chunks[0](inputs, positions, causal)
        else:
            alone = micro_batch_context.MicroBatchContext(
                tier=Tier(packing_length=n, exchange="a2a"), cp_group=None, position_ids=positions[0], max_seqlen=n,
                split=split_pack(
                    np.array([0, n]), num_tokens=n, cp_degree=1, cp_rank=0, zigzag=False, device=inputs.device
                ),
                is_real=torch.ones(n, dtype=torch.bool),
                sample_index=torch.zeros(n, dtype=torch.long), sample_tokens=torch.tensor([n]),
                sample_supervised=torch.tensor([int(mask[1:].sum())]), num_real_tokens=n,
                num_supervised_tokens=int(mask[1:].sum()),
            )  # fmt: skip
            with micro_batch_context.bind(alone):
                logits = chunks[0](inputs, positions, None)
        rows = torch.from_numpy(np.flatnonzero(mask[1:]))
        losses = torch.nn.functional.cross_entropy(logits[0, rows], torch.from_numpy(tokens)[rows + 1], reduction="sum")
        (losses / dist.get_world_size()).backward()  # four ranks add up the same gradient: a quarter each, exactly
        num_tokens += len(rows)
    # Megatron-LM's finalize divides by the count, in fp32 (6e-8): the same call here, so that only sums are compared
    share = num_tokens if dist.get_rank() == 0 else torch.zeros_like(num_tokens)
    finalize_model_grads(chunks, share)
    return named_gradients(chunks)


def named_gradients(chunks: list) -> dict[str, torch.Tensor]:
    """Parameter name -> accumulated gradient; packed and stock models differ in the rotary wrapper only."""
    return {name: p.main_grad.clone() for name, p in chunks[0].module.named_parameters()}


def error(mine: dict[str, torch.Tensor], yard: dict[str, torch.Tensor]) -> float:
    """Largest relative deviation over parameters and ranks."""
    assert mine.keys() == yard.keys(), mine.keys() ^ yard.keys()
    worst = max(float((mine[k] - yard[k]).abs().max() / yard[k].abs().max().clamp_min(1e-30)) for k in yard)
    worst_anywhere = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(worst_anywhere, op=dist.ReduceOp.MAX)
    return worst_anywhere.item()


# ------------------------------------------------------------ broken on purpose: each must show in the gradients


@contextlib.contextmanager
def _no_mask() -> Iterator[None]:
    """Samples of a pack see each other."""

    def one_segment(*args, **kwargs):
        cut = cutter(*args, **kwargs)
        object.__setattr__(cut, "cu_seqlens", cut.cu_seqlens[[0, -1]])
        return cut

    cutter = batch.slice_of_pack
    with mock.patch.object(feed, "slice_of_pack", one_segment):
        yield


@contextlib.contextmanager
def _boundary_off_by_one() -> Iterator[None]:
    """Samples end one token late."""

    def shifted(*args, **kwargs):
        cut = cutter(*args, **kwargs)
        cut.cu_seqlens[1:-1] += np.diff(cut.cu_seqlens)[1:] > 1
        return cut

    cutter = batch.slice_of_pack
    with mock.patch.object(feed, "slice_of_pack", shifted):
        yield


@contextlib.contextmanager
def _wrong_head_order() -> Iterator[None]:
    """Heads come back from the exchange in reverse order of ranks."""

    def reverse(out, shared, group):
        back = exchange_back(out, shared, group)
        c = dist.get_world_size(group)
        s, h, d = back.shape
        return back.reshape(s, c, h // c, d).flip(1).reshape(s, h, d)

    exchange_back = a2a.heads_to_sequence
    with mock.patch.object(a2a, "heads_to_sequence", reverse):
        yield


@contextlib.contextmanager
def _mean_of_means() -> Iterator[None]:
    """Each rank divides by its own tokens (the paper's biased Token-Mean)."""

    def mean(losses):
        total, count, report = loss.loss_sum(losses)
        return total / count.clamp_min(1), (count > 0).int(), report

    with mock.patch.object(forward, "loss_sum", mean):
        yield


@contextlib.contextmanager
def _label_of_next_sample() -> Iterator[None]:
    """The last token of a sample predicts the first of the next."""

    def leaking(samples, **kwargs):
        joined = [(np.concatenate([t for t, _ in samples]), np.concatenate([m for _, m in samples]))] if samples else []
        cut, whole = cutter(samples, **kwargs), cutter(joined, **kwargs)
        for name in ("supervised", "labels", "rows_to", "rows_from"):
            object.__setattr__(cut, name, getattr(whole, name))
        return cut

    cutter = batch.slice_of_pack
    with mock.patch.object(feed, "slice_of_pack", leaking):
        yield


BREAKAGES = {
    "no mask": _no_mask,
    "boundary off by one": _boundary_off_by_one,
    "wrong head order": _wrong_head_order,
    "mean of means": _mean_of_means,
    "label of the next sample": _label_of_next_sample,
}

if __name__ == "__main__":
    main(sys.argv[-1])
