"""What a layer may know of the micro-batch it is working on.

Megatron-LM hands its layers tensors only, and its own context-parallel group is static. Ours changes from micro-batch
to micro-batch, so it travels beside the tensors: `bind(context)` makes one `MicroBatchContext` current for one forward
pass and restores the previous one in `finally`. A recompute during the backward pass runs when another micro-batch may
be current (1F1B); `capture_context` therefore keeps the forward's context with every recomputed function.

Shapes: `s` tokens of this rank's slice, `t` tokens of the whole pack (s * cp_degree), `n` samples of the pack (one,
empty, for a dummy).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.model.split import Split
from megatron_hbp.planning.core.tiers import Tier


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchContext:
    """The runtime context of one micro-batch on one rank."""

    tier: Tier
    """How it runs: CP degree, layout, exchange (chosen, not auto), kernel, recompute; a dummy has one of its own."""
    cp_group: dist.ProcessGroup | None
    """The group that shares this pack; None at CP degree 1."""
    position_ids: torch.Tensor
    """int64 [s]: position of each local token inside its own sample."""
    max_seqlen: int
    """Tokens of the longest sample."""
    split: Split
    """Whose attention is computed where."""
    is_real: torch.Tensor
    """bool [s]: False for padding."""
    sample_index: torch.Tensor
    """int64 [s]: the sample of the pack that a token belongs to; padding has that of the last one."""
    sample_tokens: torch.Tensor
    """int64 [n]: tokens of each sample of the whole pack."""
    sample_supervised: torch.Tensor
    """int64 [n]: supervised positions of each sample of the whole pack."""
    num_real_tokens: int
    """Tokens of the whole pack without padding."""
    num_supervised_tokens: int
    """Supervised positions of the whole pack."""


_current: MicroBatchContext | None = None
_on_bind: list[Callable[[MicroBatchContext], None]] = []


def current() -> MicroBatchContext:
    """The bound context; asking without one is our mistake."""
    assert _current is not None, "no micro-batch is bound: forward must run inside `with bind(context)`"
    return _current


def is_bound() -> bool:
    """True inside `with bind(context)`."""
    return _current is not None


@contextlib.contextmanager
def bind(context: MicroBatchContext) -> Iterator[None]:
    """Make `context` current for a forward pass, or for the recompute of one.

    A plain module variable and not a ContextVar: autograd runs backward in threads of its own on CUDA, while the thread
    that started it waits, so exactly one thread of a process is ever inside.
    """
    global _current
    previous = _current
    _switch(context)
    try:
        yield
    finally:
        if previous is None:
            _current = None
        else:
            _switch(previous)


def _switch(context: MicroBatchContext) -> None:
    global _current
    _current = context
    for callback in _on_bind:
        callback(context)


@contextlib.contextmanager
def on_bind(callback: Callable[[MicroBatchContext], None]) -> Iterator[None]:
    """Call `callback` whenever a context becomes current (the recompute switch of a model registers here)."""
    _on_bind.append(callback)
    try:
        yield
    finally:
        _on_bind.remove(callback)


def capture_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind the context that is current *now* around every later call of `function`; without one, change nothing."""
    if _current is None:
        return function
    captured = _current

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _current is captured:
            return function(*args, **kwargs)
        with bind(captured):
            return function(*args, **kwargs)

    return call
