"""Runs on 4 gloo ranks: what is broken on purpose, and what sees it.

Most breakages show in fp64 gradients, held against the yardstick of the correct code (one sample at a time; for balance
losses the same packs at CP 1). Positions are the exception: rotary attention depends on differences of positions only,
so a pack whose positions run on gives the same gradients, and the positions themselves have to be looked at.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from megatron_hbp.feed import batch, feed  # noqa: E402
from megatron_hbp.model import context, recompute, router  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402
from tests.equivalence.support.stepping import Stepper, alone, worst  # noqa: E402
from tests.equivalence.support.worker import BREAKAGES  # noqa: E402

LENGTHS = [17, 5, 40, 23, 31, 9, 60, 33, 50, 11, 8, 25]
FULL = Recompute(granularity="full", num_layers=1)
MODULES = {"dense": ("core_attn",), "moe": ("core_attn", "mla_up_proj", "moe")}
"""core_attn reads the borders of samples, moe the padding; mla_up_proj is handed its rotary table and reads nothing."""
POLICIES = {
    kind: {
        "none": Recompute(),
        "full": FULL,
        **{name: Recompute(granularity="selective", modules=(name,)) for name in modules},
    }
    for kind, modules in MODULES.items()
}
# (step, slot, rank0, tier, samples) of two data-parallel ranks; tier 1 is that of CP 2
TWO_RANKS = [(0, 0, 0, 1, [0, 1, 2]), (0, 1, 0, 1, [3, 4, 5]), (0, 2, 0, 1, [6, 7]), (0, 3, 0, 1, [8, 9, 10, 11])]
FOUR_RANKS = [
    (0, 0, 0, 2, [6, 7, 0, 1]), (0, 1, 0, 1, [2, 3]), (0, 1, 2, 0, [4, 5]), (0, 1, 3, 0, [9]), (0, 2, 0, 0, [8]),
    (0, 2, 1, 0, [10]), (0, 2, 2, 1, [11]),
]  # fmt: skip


def main(result_path: str) -> None:
    """Write {case: what it gave}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    recompute.install_context_capture()
    results: dict[str, Any] = {}
    for part in (positions, heads_and_means, balance, other_micro_batch):
        part(results)
        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            print(json.dumps(results), flush=True)
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def tiers_of(*degrees: int, policy: Recompute = Recompute()) -> list[Tier]:
    return [Tier(packing_length=64 * c, cp_degree=c, recompute=policy) for c in degrees]


def stepper_of(kind: str, degrees: Sequence[int], **changes: Any) -> Stepper:
    return Stepper(build(kind, **changes), MemoryStore.random(LENGTHS, vocabulary=VOCABULARY), degrees)


# ---------------------------------------------------------------- positions


@contextlib.contextmanager
def positions_not_reset() -> Iterator[None]:
    """Positions run through the whole pack."""

    def running_on(samples: Any, *, padded_length: int, cp_degree: int, cp_rank: int, **kwargs: Any) -> batch.PackSlice:
        cut = cutter(samples, padded_length=padded_length, cp_degree=cp_degree, cp_rank=cp_rank, **kwargs)
        s = padded_length // cp_degree
        object.__setattr__(cut, "position_ids", np.arange(cp_rank * s, (cp_rank + 1) * s))
        return cut

    cutter, plain = batch.slice_of_pack, feed.MicroBatchContext
    with (
        mock.patch.object(feed, "slice_of_pack", running_on),
        # the rotary table reaches as far as the longest sample: let it reach as far as the pack
        mock.patch.object(feed, "MicroBatchContext", lambda **kw: plain(**{**kw, "max_seqlen": 256})),
    ):
        yield


def count_wrong_positions(stepper: Stepper) -> int:
    """Tokens, over all ranks, whose position is not their distance from the start of their own sample."""
    lengths = stepper.store.lengths
    plan = plan_of(FOUR_RANKS, tiers=tiers_of(1, 2, 4), lengths=lengths, num_ranks=4)
    wrong = 0
    for micro_batch in feed.Feed(
        plan=plan, store=stepper.store, groups=stepper.groups, rank=dist.get_rank(), unit=1, full_length=False,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    ):  # fmt: skip
        whole = np.concatenate([np.arange(lengths[i]) for i in micro_batch.sample_ids] or [np.zeros(0)])
        group, s = micro_batch.context.cp_group, micro_batch.tokens.shape[1]
        start = s * (dist.get_rank(group) if group is not None else 0)
        mine = whole[start : start + micro_batch.num_local_tokens]
        wrong += int((micro_batch.context.position_ids[: len(mine)].numpy() != mine).sum())
    total = torch.tensor(wrong)
    dist.all_reduce(total)
    return int(total)


def positions(results: dict[str, Any]) -> None:
    """Seen in the positions, and not in the gradients."""
    parallel_state.initialize_model_parallel()
    for kind in ("dense", "moe"):
        stepper = stepper_of(kind, (1, 2, 4))
        results[f"{kind} wrong positions, correct code"] = count_wrong_positions(stepper)
        with positions_not_reset():
            results[f"{kind} wrong positions, not reset"] = count_wrong_positions(stepper)
        for tables in ("fp32", "fp64"):
            if tables == "fp64":
                for module in stepper.chunks[0].modules():
                    if isinstance(module, RotaryEmbedding):
                        module.inv_freq = module.inv_freq.double()
                        module.forward.cache_clear()
            yard = stepper.gradients(alone(len(LENGTHS), 4), tiers_of(1))
            with positions_not_reset():
                mine = stepper.gradients(FOUR_RANKS, tiers_of(1, 2, 4))
            results[f"{kind} gradients, positions not reset, {tables} rotary tables"] = worst(mine, yard)


# ---------------------------------------------------------------- attention and loss


def heads_and_means(results: dict[str, Any]) -> None:
    """The breakages of worker.py once more, under tensor parallelism."""
    parallel_state.initialize_model_parallel(2, expert_tensor_parallel_size=1)
    for kind in ("dense", "moe"):
        stepper = stepper_of(kind, (1, 2))
        yard = stepper.gradients(alone(len(LENGTHS), 2), [Tier(packing_length=128)])
        packs = [*TWO_RANKS[:2], (0, 2, 0, 0, [6]), (0, 2, 1, 0, [7]), TWO_RANKS[3]]
        results[f"{kind} tp2 correct code"] = worst(stepper.gradients(packs, tiers_of(1, 2)), yard)
        for name, breakage in BREAKAGES.items():
            with breakage():
                results[f"{kind} tp2 {name}"] = worst(stepper.gradients(packs, tiers_of(1, 2)), yard)


# ---------------------------------------------------------------- balance losses


@contextlib.contextmanager
def static_group() -> Iterator[None]:
    """Megatron-LM's own router: sums over its static group (here of one rank), counts padding."""
    with mock.patch.object(router.PackedRouter, "routing", TopKRouter.routing):
        yield


@contextlib.contextmanager
def no_group() -> Iterator[None]:
    """Counts of this rank's slice only."""
    with mock.patch.object(router._LocalTokens, "summed", lambda self, values: values.detach().clone()):
        yield


@contextlib.contextmanager
def padding_counted() -> Iterator[None]:
    """Padding is taken for tokens."""

    def of_current(tp_group: Any, num_tokens: int) -> Any:
        tokens = plain(tp_group, num_tokens)
        tokens.real = torch.ones_like(tokens.real)
        return tokens

    plain = router._LocalTokens.of_current
    with mock.patch.object(router._LocalTokens, "of_current", of_current):
        yield


def balance(results: dict[str, Any]) -> None:
    """Balance losses over the wrong tokens."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    at_cp1 = [(0, slot, rank0, tier, samples) for slot, (_, _, rank0, tier, samples) in enumerate(FOUR_RANKS)]
    for kind in ("aux_loss", "seq_aux_loss"):
        stepper = stepper_of("moe", (1, 2, 4), moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.1)
        yard = stepper.gradients(at_cp1, [Tier(packing_length=64 * c) for c in (1, 2, 4)])

        def step(stepper: Stepper = stepper, yard: dict[str, torch.Tensor] = yard) -> float:
            return worst(stepper.gradients(FOUR_RANKS, tiers_of(1, 2, 4), extra_unit=8), yard)

        results[f"{kind} correct code"] = step()
        for breakage in (static_group, no_group, padding_counted):
            with breakage():
                results[f"{kind} {breakage.__name__}"] = step()


# ---------------------------------------------------------------- recompute of another micro-batch


@contextlib.contextmanager
def reads_the_current() -> Iterator[None]:
    """A recompute finds the micro-batch that ran forward last, not its own."""

    @contextlib.contextmanager
    def bind_for_good(new: context.MicroBatchContext) -> Iterator[None]:
        context._switch(new)
        yield

    with (
        mock.patch.object(recompute, "capture_context", lambda function: function),
        mock.patch.object(context, "bind", bind_for_good),
        mock.patch.object(context, "_current", None),
    ):
        yield


def other_micro_batch(results: dict[str, Any]) -> None:
    """1F1B over two stages: when one micro-batch is recomputed, the next has already run forward on the first stage."""
    parallel_state.initialize_model_parallel(1, 2)
    dense = stepper_of("dense", (1, 2), num_layers=2)
    # on the last stage every micro-batch is recomputed before the next one runs: the first must have an MoE layer
    loss = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    moe = stepper_of("moe", (1, 2), num_layers=2, moe_layer_freq=[1, 1], **loss)
    for kind, stepper in {"dense": dense, "moe": moe}.items():
        at_cp1 = stepper.gradients(TWO_RANKS, [Tier(packing_length=128)] * 2, fixed_shapes=True)
        kept = stepper.gradients(TWO_RANKS, tiers_of(1, 2), fixed_shapes=True)
        for name, policy in POLICIES[kind].items():
            step = functools.partial(stepper.gradients, TWO_RANKS, tiers_of(1, 2, policy=policy), fixed_shapes=True)
            mine = step()
            results[f"pp2 {kind} {name}, captured"] = worst(mine, kept)
            results[f"pp2 {kind} {name}, correct code"] = worst(mine, at_cp1)
            with reads_the_current():
                results[f"pp2 {kind} {name}, reads the current"] = worst(step(), kept)
            if kind == "moe":
                with static_group():
                    results[f"pp2 {kind} {name}, static group"] = worst(step(), at_cp1)
    results["recompute without a context"] = refusal(dense)


def refusal(stepper: Stepper) -> str:
    """What a recompute without its context says where that is bound for the forward only; every rank alone."""
    micro_batch = next(
        feed.Feed(
            plan=plan_of([(0, 0, r, 0, [r]) for r in range(2)], tiers=tiers_of(1, policy=FULL),
                         lengths=stepper.store.lengths, num_ranks=2),
            store=stepper.store, groups=stepper.groups, rank=parallel_state.get_data_parallel_rank(),  # type: ignore[arg-type]
            unit=1, full_length=True, device=torch.device("cpu"),
        )
    )  # fmt: skip
    refused = ""
    with mock.patch.object(recompute, "capture_context", lambda function: function):
        hidden = torch.ones(64, 1, 32, dtype=torch.float64, requires_grad=True)
        with context.bind(micro_batch.context):
            layer = stepper.chunks[0].module.decoder.layers[0]
            out = recompute.tensor_parallel.checkpoint(
                lambda x: layer(x, None, rotary_pos_emb=rotary_of(stepper))[0], False, hidden
            )
        try:
            out.sum().backward()
        except AssertionError as error:
            refused = str(error)
    return refused


def rotary_of(stepper: Stepper) -> torch.Tensor:
    return stepper.chunks[0].module.rotary_pos_emb(64)


if __name__ == "__main__":
    main(sys.argv[-1])
