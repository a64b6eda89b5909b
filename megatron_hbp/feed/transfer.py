"""Tensors of a micro-batch from the host to the device, without waiting."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


def pinned[T](value: T, device: torch.device) -> T:
    """`value` with all its tensors in page-locked memory, where `device` is a CUDA device; else as it is.

    A copy from pageable memory makes the host wait until the driver has staged it, `non_blocking` or not.
    """
    return moved(value, torch.Tensor.pin_memory) if device.type == "cuda" else value


def on_device[T](value: T, device: torch.device) -> T:
    """`value` with all its tensors on `device`, for the stream that is current in the calling thread.

    To be called by the consumer: the copies are then queued in the stream that will read them, in order, and nothing
    needs an event. Torch's allocator of pinned memory records one itself, and hands a block out again only when the
    copies from it are done, so the host tensors may be dropped at once.
    """
    return value if device.type == "cpu" else moved(value, lambda tensor: tensor.to(device, non_blocking=True))


def moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `move` done to every tensor in it, through dataclasses and tuples; what has none is not copied."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], int):  # not the borders of thousands of samples
        parts = tuple(moved(part, move) for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: new for name, old in fields.items() if (new := moved(old, move)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    return value
