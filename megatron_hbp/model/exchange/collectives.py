"""Differentiable exchanges of rows between the ranks of a group, and a count of what they receive.

Legend: `c` ranks; rows are a tensor's first dimension. Unequal numbers of rows are the rule: every rank knows all of
them from the plan, so nothing is asked over the wire.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Way = tuple[tuple[int, ...], tuple[int, ...], dist.ProcessGroup]
"""Rows to each rank, rows from each rank, and the group."""


class Traffic:
    """Bytes received from other ranks, inside this rank's node and from other nodes."""

    def __init__(self, node_size: int):
        self.node_size = node_size
        self.inside = 0
        self.outside = 0

    def add(self, group: dist.ProcessGroup, received: Sequence[int]) -> None:
        """Count `received` bytes from each rank of `group`; what a rank keeps is no traffic."""
        here = dist.get_rank()
        for rank, num_bytes in zip(dist.get_process_group_ranks(group), received, strict=True):
            if rank == here:
                continue
            if rank // self.node_size == here // self.node_size:
                self.inside += num_bytes
            else:
                self.outside += num_bytes


_counting: Traffic | None = None


@contextlib.contextmanager
def count_traffic(node_size: int) -> Iterator[Traffic]:
    """Count the traffic of all exchanges, forward and backward, inside the block."""
    global _counting
    previous, _counting = _counting, Traffic(node_size)
    try:
        yield _counting
    finally:
        _counting = previous


def count(group: dist.ProcessGroup, received: Sequence[int]) -> None:
    """Tell a running count what this rank receives from each rank of `group`, in bytes."""
    if _counting is not None:
        _counting.add(group, received)


def all_to_all_rows(
    rows: torch.Tensor, rows_to: Sequence[int], rows_from: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send the first rows_to[0] rows to rank 0 and so on; returns [sum(rows_from), ...] in rank order."""
    return Transfer(rows, rows_to, rows_from, group).wait()


def all_gather_rows(rows: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows of all ranks, [sum(counts), ...] in rank order; the backward sums each rank's gradients at its owner."""
    return _AllGather.apply(rows, tuple(counts), group)


class Transfer:
    """Rows under way: what has been started hides under whatever is computed before `wait`, in the backward too.

    Autograd runs the backward of later operations first: that of `wait` starts the way back, that of the start waits.
    """

    def __init__(self, rows: torch.Tensor, rows_to: Sequence[int], rows_from: Sequence[int], group: dist.ProcessGroup):
        """Start an all-to-all as `all_to_all_rows` runs."""
        self.there, self.back = (tuple(rows_to), tuple(rows_from), group), (tuple(rows_from), tuple(rows_to), group)
        self.work: dist.Work | None = None
        self.sent: torch.Tensor | None = None  # kept until it has left
        self.returned: torch.Tensor | None = None
        self.rows = _Start.apply(rows, self)

    def start(self, rows: torch.Tensor, way: Way) -> torch.Tensor:
        """Rows that will hold what arrives."""
        self.sent = rows.contiguous()
        received, self.work = _started(self.sent, *way)
        return received

    def arrived(self) -> None:
        """Wait for what was started last."""
        assert self.work is not None
        self.work.wait()
        self.work = self.sent = None

    def wait(self) -> torch.Tensor:
        """[sum(rows_from), ...] in rank order."""
        rows, self.rows = _Wait.apply(self.rows, self), None
        return rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, transfer: Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        return transfer.start(rows, transfer.there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        ctx.transfer.arrived()
        returned, ctx.transfer.returned = ctx.transfer.returned, None
        return returned, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, transfer: Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        transfer.arrived()
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.transfer.returned = ctx.transfer.start(grad, ctx.transfer.back)
        return grad, None


class _AllGather(torch.autograd.Function):
    """By all-to-all both ways: gloo and NCCL take unequal row counts there, and the bytes are the same."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        c = len(counts)
        copies = rows.expand(c, *rows.shape).reshape(c * rows.shape[0], *rows.shape[1:])
        return _exchanged(copies, (rows.shape[0],) * c, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mine = ctx.counts[dist.get_rank(ctx.group)]
        parts = _exchanged(grad, ctx.counts, (mine,) * len(ctx.counts), ctx.group)
        return parts.reshape(len(ctx.counts), mine, *grad.shape[1:]).sum(0), None, None


def _exchanged(
    rows: torch.Tensor, rows_to: tuple[int, ...], rows_from: tuple[int, ...], group: dist.ProcessGroup
) -> torch.Tensor:
    received, work = _started(rows.contiguous(), rows_to, rows_from, group)
    work.wait()
    return received


def _started(
    rows: torch.Tensor, rows_to: tuple[int, ...], rows_from: tuple[int, ...], group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    received = rows.new_empty((sum(rows_from), *rows.shape[1:]))
    work = dist.all_to_all_single(received, rows, list(rows_from), list(rows_to), group=group, async_op=True)
    assert work is not None
    row_bytes = received[:1].numel() * received.element_size() if len(received) else 0
    count(group, [n * row_bytes for n in rows_from])
    return received, work
