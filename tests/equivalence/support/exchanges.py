"""Runs on 4 gloo ranks: every exchange in every layout against attention over the whole pack on one rank, in fp64.

First without a model: outputs, gradients and received bytes of each exchange's `shared_attention`, CP 2, 3 and 4. Then
the dense model through our feed and Megatron-LM's schedule, tier by tier another exchange, against one sample at a time
through Megatron-LM's own model. Last, broken on purpose.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402

from megatron_hbp.feed.batch import slice_of_pack  # noqa: E402
from megatron_hbp.model import blocks, kernels, split  # noqa: E402
from megatron_hbp.model.exchange import implementation, p2p  # noqa: E402
from megatron_hbp.model.exchange.collectives import count_traffic  # noqa: E402
from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.planning.core.exchanges import EXCHANGES  # noqa: E402
from megatron_hbp.planning.core.model import AttentionShape  # noqa: E402
from megatron_hbp.planning.core.slices import padded_length  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore  # noqa: E402
from tests.equivalence.support.stepping import Stepper  # noqa: E402
from tests.equivalence.support.worker import LENGTHS, PACKS, error, yardstick  # noqa: E402

CPU = torch.device("cpu")
NAMES = ("a2a", "all_gather", "p2p")
RNG = np.random.default_rng(5)
PACKS_ALONE = {
    "ragged": [37, 5, 1, 18, 64, 9, 2, 40],
    "one long sample": [97],
    "one-token samples": [1] * 13 + [40] + [1] * 11,
    "borders of 12": [12] * 8,
    "borders of 16": [16] * 6,
    "borders of 24": [24, 48, 24],
    "ranks without shared tokens": [60, *[1] * 60],
    "a short last rank": [90, 2, 1, 1],
    **{f"random {i}": RNG.integers(1, 60, RNG.integers(2, 9)).tolist() for i in range(4)},
}
PARTLY_AT_HOME = ("ragged", "ranks without shared tokens", "random 0")
# query heads, KV heads, width of q and k, of v: fewer KV heads than ranks, MLA-like, one KV head, wide values
SHAPES = [(12, 2, 8, 8), (12, 12, 12, 8), (12, 1, 8, 8), (12, 3, 6, 10)]


class Attended(NamedTuple):
    """One exchange of one pack on one rank, against the whole pack."""

    error: float
    """Largest deviation of output and gradients, relative to the largest value."""
    num_shared: int
    """Tokens of shared samples here."""
    forward_bytes: int
    backward_bytes: int


def main(result_path: str) -> None:
    """Run every case and write {kind: {case: figure}}."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    install_context_capture()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    three, four = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2, 3])
    rank = dist.get_rank()
    groups = {2: pairs[rank // 2], 3: three if rank < 3 else None, 4: four}
    results: dict[str, Any] = {"alone": alone(groups), "idle ranks": idle_ranks(groups[4]), "bytes": received(groups)}
    results["half"] = half(groups[4])
    results["model"], results["model bytes"], results["broken model"] = model()
    results["broken"] = {}
    for name, breakage in BREAKAGES.items():
        with breakage():
            deviation = attend("p2p", PACKS_ALONE["ragged"], SHAPES[0], groups[4], zigzag=True).error
            results["broken"][name] = largest(deviation)
    if rank == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def largest(figure: float) -> float:
    """Over all ranks."""
    anywhere = torch.tensor(float(figure), dtype=torch.float64)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return anywhere.item()


# ---------------------------------------------------------------------------------------------- without a model


def attend(
    exchange: str, lengths: list[int], shape: tuple[int, int, int, int], group: dist.ProcessGroup, *,
    zigzag: bool, all_shared: bool = True, dtype: torch.dtype = torch.float64,
) -> Attended:  # fmt: skip
    """The exchange of one pack in `group`; without `all_shared` short samples stay local as in training.

    Whatever the `dtype`, the yardstick works in fp64, on the same numbers.
    """
    c, here = dist.get_world_size(group), dist.get_rank(group)
    length = padded_length(sum(lengths), cp_degree=c, unit=1 + zigzag)
    ones = [(np.ones(n, np.int64), np.ones(n, np.int64)) for n in lengths]
    cu_seqlens = slice_of_pack(ones, padded_length=length, cp_degree=c, cp_rank=0, zigzag=zigzag).cu_seqlens
    nobody = mock.patch.object(split, "stays_local", lambda starts, *_: np.zeros(len(starts) - 1, bool))
    with nobody if all_shared else contextlib.nullcontext():
        shared = split.split_pack(
            cu_seqlens, num_tokens=sum(lengths), cp_degree=c, cp_rank=here, zigzag=zigzag, device=CPU
        ).shared
    if shared is None:
        return Attended(0.0, 0, 0, 0)
    h, g, d, dv = shape
    x, scale = sum(shared.counts), 1 / math.sqrt(d)
    torch.manual_seed(x)
    sizes = ((h, d), (g, d), (g, dv), (h, dv))
    *whole, towards = (torch.randn(x, *size, dtype=torch.float64).to(dtype).double() for size in sizes)
    q, k, v = whole = [tensor.requires_grad_() for tensor in whole]
    expected = kernels.reference(q, k, v, shared.segments, scale)
    yard = [expected, *torch.autograd.grad(expected, whole, towards)]

    rows = torch.tensor([i for a, b in shared.ranges_of[here] for i in range(a, b)], dtype=torch.long)
    q, k, v = mine = [tensor.detach()[rows].to(dtype).requires_grad_() for tensor in whole]
    with count_traffic(node_size=8) as forward:
        out = implementation(exchange).start(q, k, v, shared, group)(kernels.reference, scale)
    with count_traffic(node_size=8) as backward:
        grads = torch.autograd.grad(out, mine, towards[rows].to(dtype))
    deviation = 0.0
    for ours, theirs in zip((out, *grads), yard, strict=True):
        assert ours.shape == theirs[rows].shape and ours.dtype == dtype, (exchange, ours.shape)
        if len(rows):
            deviation = max(deviation, float((ours - theirs[rows]).abs().max() / theirs.abs().max()))
    return Attended(deviation, len(rows), forward.inside + forward.outside, backward.inside + backward.outside)


def alone(groups: dict[int, dist.ProcessGroup | None]) -> dict[str, float]:
    """{exchange, CP degree and layout: largest deviation over all packs}, shapes of heads in turn."""
    worst: dict[str, float] = {}
    turn = count()
    for c, group in groups.items():
        for zigzag in (False, True):
            for pack, lengths in PACKS_ALONE.items():
                shape = SHAPES[next(turn) % len(SHAPES)]
                for exchange in NAMES:
                    case = f"{exchange} cp{c} {'zigzag' if zigzag else 'contiguous'}"
                    worst.setdefault(case, 0.0)
                    if group is None:
                        continue
                    for all_shared in (True, False) if pack in PARTLY_AT_HOME else (True,):
                        done = attend(exchange, lengths, shape, group, zigzag=zigzag, all_shared=all_shared)
                        worst[case] = max(worst[case], done.error)
    return {case: largest(figure) for case, figure in worst.items()}


def idle_ranks(group: dist.ProcessGroup) -> dict[str, float]:
    """{exchange: whether a rank without shared tokens took part}, so that the case is known to be covered."""
    lengths = PACKS_ALONE["ranks without shared tokens"]
    return {
        name: largest(attend(name, lengths, SHAPES[0], group, zigzag=False, all_shared=False).num_shared == 0)
        for name in NAMES
    }


def received(groups: dict[int, dist.ProcessGroup | None]) -> dict[str, list[float]]:
    """{case: bytes received in the forward, as planned, in the backward} where one sample is the whole pack."""
    bytes_of = {}
    for c in (2, 4):
        for h, g, d, dv in SHAPES:
            shape = AttentionShape(num_query_heads=h, num_kv_heads=g, qk_width=d, v_width=dv)
            for exchange in NAMES:
                group = groups[c]
                assert group is not None
                done = attend(exchange, [96], (h, g, d, dv), group, zigzag=exchange != "a2a")
                planned = EXCHANGES[exchange].elements(shape, c) * (96 // c) * 8
                bytes_of[f"{exchange} cp{c} {h}/{g} heads of {d}/{dv}"] = [
                    done.forward_bytes, planned, done.backward_bytes
                ]  # fmt: skip
    return bytes_of


def half(group: dist.ProcessGroup) -> dict[str, list[float]]:
    """{exchange: largest deviation in bf16, backward over forward bytes}."""
    done = {name: attend(name, [96], SHAPES[0], group, zigzag=True, dtype=torch.bfloat16) for name in NAMES}
    return {name: [largest(one.error), one.backward_bytes / one.forward_bytes] for name, one in done.items()}


# ------------------------------------------------------------------------------------------------- with a model

RECOMPUTES = {
    "none": Recompute(),
    "full": Recompute(granularity="full", num_layers=2),
    "core_attn": Recompute(granularity="selective", modules=("core_attn",)),
}
TIERS: dict[str, tuple[dict, dict]] = {  # what the tiers of CP degree 2 and 4 say
    "all_gather": ({"exchange": "all_gather"}, {"exchange": "all_gather"}),
    "p2p": ({"exchange": "p2p"}, {"exchange": "p2p"}),
    "p2p contiguous": ({"exchange": "p2p", "layout": "contiguous"}, {"exchange": "p2p", "layout": "contiguous"}),
    "a2a zigzag": ({"exchange": "a2a", "layout": "zigzag"}, {"exchange": "a2a", "layout": "zigzag"}),
    "p2p, all_gather": ({"exchange": "p2p"}, {"exchange": "all_gather"}),
    "a2a, p2p": ({"exchange": "a2a"}, {"exchange": "p2p"}),
}


def model() -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """{tiers and recompute: largest relative error of a gradient}, bytes received here, errors of each breakage."""
    parallel_state.initialize_model_parallel()
    yard = yardstick("dense")
    stepper = Stepper(build("dense"), MemoryStore.random(LENGTHS, vocabulary=VOCABULARY), (2, 4))

    def deviation(
        says: tuple[dict, dict], recompute: Recompute, *, fixed_shapes: bool = False
    ) -> tuple[float, int]:  # fmt: skip
        tiers = [
            Tier(packing_length=64 * c, cp_degree=c, recompute=recompute, **fields)
            for c, fields in zip((1, 2, 4), ({}, *says), strict=True)
        ]
        with count_traffic(node_size=8) as traffic:
            gradients = stepper.gradients(PACKS, tiers, fixed_shapes=fixed_shapes)
        return error({name.removeprefix("0."): g for name, g in gradients.items()}, yard), traffic.inside

    errors, num_bytes, broken = {}, {}, {}
    for name, says in TIERS.items():
        for policy, recompute in RECOMPUTES.items():
            case = f"{name}; recompute {policy}"
            errors[case], num_bytes[case] = deviation(says, recompute)
    for name in NAMES:  # packs padded to their tier's length, in equal slices: some ranks hold nothing but padding
        fields = {"exchange": name, "layout": "contiguous"}
        errors[f"{name}; to capacity"], _ = deviation((fields, fields), Recompute(), fixed_shapes=True)
    for name, breakage in BREAKAGES.items():
        with breakage():
            broken[name], _ = deviation(TIERS["p2p"], Recompute())
    parallel_state.destroy_model_parallel()
    return errors, num_bytes, broken


# ------------------------------------------------------------ broken on purpose: each must show in the gradients


@contextlib.contextmanager
def _skipped_step() -> Iterator[None]:
    """The keys of the last rank of the ring are not looked at."""

    def without_last(shared: split.Shared, rank: int) -> list[p2p.Block]:
        rows = [i for a, b in shared.ranges_of[rank] for i in range(a, b)]
        mine = [i for piece in shared.ranges for i in range(piece.start, piece.end)]
        return [] if rank == 0 and rows != mine else visible(shared, rank)

    visible = p2p.visible
    with mock.patch.object(p2p, "visible", without_last):
        yield


@contextlib.contextmanager
def _wrong_merge() -> Iterator[None]:
    """Blocks are averaged, as if all had seen as much."""

    def mean(out: torch.Tensor, lse: torch.Tensor, out_i: torch.Tensor, lse_i: torch.Tensor) -> None:
        out.copy_(torch.where((lse == -math.inf).T[:, :, None], out_i, (out + out_i) / 2))
        lse.copy_(torch.logaddexp(lse, lse_i))

    with mock.patch.object(blocks, "merge", mean):
        yield


@contextlib.contextmanager
def _wrong_owner() -> Iterator[None]:
    """Gradients of keys and values travel one rank too far."""

    def too_far(returning: p2p.ReturningGradients) -> torch.Tensor:
        total = arrived(returning)
        others = p2p.Hop(total, returning.sizes[returning.here - 1], returning.group).wait()
        shifted = torch.zeros_like(total)
        both = min(len(total), len(others))
        shifted[:both] = others[:both]
        return shifted

    arrived: Callable[[p2p.ReturningGradients], torch.Tensor] = p2p.ReturningGradients.arrived
    with mock.patch.object(p2p.ReturningGradients, "arrived", too_far):
        yield


@contextlib.contextmanager
def _causal_misaligned() -> Iterator[None]:
    """A query sees the key after its own."""

    def shifted(q: torch.Tensor, k: torch.Tensor, n: int, causal: bool, scale: float) -> torch.Tensor:
        seen = scores(q, k, n, causal, scale)
        if not causal or n < 2:
            return seen
        every = scores(q, k, n, False, scale).unflatten(1, (-1, n))
        seen = seen.unflatten(1, (-1, n)).clone()
        following = torch.arange(1, n)
        seen[:, :, following - 1, following] = every[:, :, following - 1, following]
        return seen.flatten(1, 2)

    scores = blocks._scores
    with mock.patch.object(blocks, "_scores", shifted):
        yield


BREAKAGES = {
    "skipped step": _skipped_step,
    "wrong merge": _wrong_merge,
    "gradient to the wrong owner": _wrong_owner,
    "causal misaligned": _causal_misaligned,
}

if __name__ == "__main__":
    main(sys.argv[-1])
