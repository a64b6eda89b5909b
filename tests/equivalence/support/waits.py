"""Which calls in a training step make the host wait for the device, and whose they are; on CPU, where none waits.

Two ways to see them: operators whose result the host reads (`_local_scalar_dense` is item(), float() and bool(),
`nonzero` also any index by a mask, ...) through a dispatch mode, and Python methods that copy to the host or build
tensors from host values without passing there. A call belongs to the innermost frame that is Megatron-LM's or ours.
"""

import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hbp.platform import cpu

cpu.apply()

from megatron.core import parallel_state  # noqa: E402

from megatron_hbp.feed import forward  # noqa: E402
from megatron_hbp.model.recompute import install_context_capture  # noqa: E402
from megatron_hbp.planning.core.tiers import Recompute, Tier  # noqa: E402
from megatron_hbp.training import metrics  # noqa: E402
from tests.blame import caller  # noqa: E402
from tests.equivalence.support.models import VOCABULARY, build  # noqa: E402
from tests.equivalence.support.plans import MemoryStore, plan_of  # noqa: E402
from tests.equivalence.support.stepping import Stepper, groups_of, laid_out  # noqa: E402

OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "_assert_async", "_ctc_loss", "histc",
}  # fmt: skip
METHODS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "pin_memory")
FROM_HOST = ("tensor", "as_tensor", "from_numpy")
"""Copied from pageable memory where they are meant for a device: the host waits for the driver."""
ON_DEVICE = ("synchronize", "empty_cache", "mem_get_info")


class Waits(TorchDispatchMode):
    """Counts {file and line: calls} in the thread that enters it; `ours` and `theirs`."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.theirs: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Waits":
        for holder, names in ((torch.Tensor, METHODS), (torch, FROM_HOST), (torch.cuda, ON_DEVICE)):
            for name in names:
                self._stack.enter_context(mock.patch.object(holder, name, self._watched(getattr(holder, name), name)))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        by_tensor = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in OPERATORS or by_mask or by_tensor:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _watched(self, function: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._count(name)
            return function(*args, **kwargs)

        return call

    def _count(self, name: str) -> None:
        if found := caller(sys._getframe(2)):
            (self.ours if found[0] else self.theirs)[f"{found[1]} {name}"] += 1


LENGTHS = [17, 40, 23, 60, 33, 9, 31, 25]
TIERS = (
    Tier(packing_length=64),
    Tier(packing_length=64, cp_degree=2, recompute=Recompute(granularity="full", num_layers=1)),
    Tier(packing_length=128, cp_degree=2, recompute=Recompute(granularity="selective", modules=("core_attn",))),
)
# each step: CP 1 beside CP 1, then CP 2 with local samples and shared, then CP 2
PACKS = [
    (step, slot, *pack)
    for step in range(3)
    for slot, pack in ((0, (0, 0, [0, 1])), (0, (1, 0, [2])), (1, (0, 1, [5, 6])), (2, (0, 2, [3, 4])))
]
BALANCE = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.01, 0.01],
    "moe_z_loss_coeff": 0.001,
}  # fmt: skip


def main(result_path: str) -> None:
    """Write {case: [ours, theirs]} of the steps after the first one."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    install_context_capture()
    results: dict[str, Any] = {}
    with laid_out():
        groups = groups_of((2,))
        for kind, changes in (("dense", {}), ("moe", BALANCE)):
            results[kind] = counted(kind, groups, changes)
        with _reads_its_count():
            results["dense, broken"] = counted("dense", groups, {})
        results["summary"] = summary()
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.destroy_process_group()


def counted(kind: str, groups: Any, changes: dict[str, Any]) -> list[dict[str, int]]:
    """Calls in forward, backward and gradient reduction of steps 1 and 2; the feed prepares in its thread."""
    stepper = Stepper(build(kind, **changes), MemoryStore.random(LENGTHS, vocabulary=VOCABULARY), groups)
    waits = Waits()
    steps = stepper.steps(PACKS, TIERS, read_ahead=2)
    next(steps)
    with waits:
        for _ in steps:
            pass
    return [dict(waits.ours), dict(waits.theirs)]


def summary() -> list[dict[str, int]]:
    """The end of a run may wait: what it reads must be seen here."""
    plan = plan_of(PACKS, tiers=TIERS, lengths=MemoryStore.random(LENGTHS, vocabulary=8).lengths, num_ranks=2)
    with Waits() as waits:
        metrics.RunMetrics(plan, None).summarise(parallel_state.get_data_parallel_group())
    return [dict(waits.ours), dict(waits.theirs)]


@contextlib.contextmanager
def _reads_its_count() -> Iterator[None]:
    """The loss reads how many tokens it sums, as if it were our file that does."""
    source = """def loss_sum(losses):
        total, count, report = plain(losses)
        return total, count + 0 * count.item(), report"""
    scope = {"plain": forward.loss_sum}
    exec(compile(source, "/somewhere/megatron_hbp/model/broken.py", "exec"), scope)
    with mock.patch.object(forward, "loss_sum", scope["loss_sum"]):
        yield


if __name__ == "__main__":
    main(sys.argv[-1])
