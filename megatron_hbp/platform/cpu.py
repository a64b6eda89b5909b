"""Lets the released `megatron.core` and `megatron.training` run on CPU with gloo.

`apply()` is called by the entry points before anything of Megatron-LM is built, and only where there is no CUDA device
(or HBP_PLATFORM=cpu asks for it); with CUDA this module is never imported. Every change is one function below, marked
`@patch(why)`, so that `PATCHES` is the whole list and `tests/unit/platform` can test each by name. Nothing here changes
numbers: a patch only answers "cpu" where Megatron-LM takes a CUDA device for granted.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_hbp.platform.malloc import keep_freed_memory


class Patch(NamedTuple):
    """One named change to torch or Megatron-LM, and the reason for it."""

    name: str
    why: str
    apply: Callable[[], None]


PATCHES: list[Patch] = []

FLAGS = (
    "--distributed-backend", "gloo",
    "--transformer-impl", "local",
    "--use-cpu-initialization",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
)  # fmt: skip
"""Megatron-LM flags that choose what exists on a CPU; they go before the user's."""

_applied = False


def is_needed() -> bool:
    """True where there is no CUDA device, or where HBP_PLATFORM=cpu asks for this layer."""
    return os.environ.get("HBP_PLATFORM") == "cpu" or not torch.cuda.is_available()


def apply() -> None:
    """Apply every patch, once per process."""
    global _applied
    if _applied:
        return
    _applied = True
    keep_freed_memory()
    for patch_ in PATCHES:
        patch_.apply()


def patch(why: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function as a patch; `why` says what Megatron-LM does that needs it."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        PATCHES.append(Patch(function.__name__, why, function))
        return function

    return register


# ---------------------------------------------------------------- torch


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "as_tensor", "eye", "linspace")
_LIKE_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like")


@patch("tensors are made with device='cuda' or device=torch.cuda.current_device() all over megatron")
def factories_on_cpu() -> None:
    """Send `device='cuda'` of the tensor factories to the CPU.

    Plain wrappers and not a TorchFunctionMode: a mode is thread-local, so the autograd thread would not see it, and
    it taxes every torch call of the step, not just the factories.
    """

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES + _LIKE_FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


@patch("batches, gradients and modules are moved with .cuda() and .to('cuda')")
def moves_stay_on_cpu() -> None:
    """Make `.cuda()` and `.to('cuda')` of tensors and modules keep them where they are."""
    tensor_to, module_to = torch.Tensor.to, torch.nn.Module.to

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    def redirect(move: Callable) -> Callable:
        @functools.wraps(move)
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], str | torch.device | int) and (_is_cuda(args[0]) or type(args[0]) is int):
                args = ("cpu", *args[1:])
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return move(self, *args, **kwargs)

        return to

    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]
    torch.Tensor.to = redirect(tensor_to)  # type: ignore[method-assign]
    torch.nn.Module.to = redirect(module_to)  # type: ignore[method-assign]


@patch("optimizer.py:1009, distrib_optimizer.py:401 and clip_grads.py:174 look for torch.cuda.*Tensor type names")
def type_names_say_cuda() -> None:
    """Let `Tensor.type()` answer with the CUDA name of its type; conversions by `type(dtype)` stay as they are."""
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    setattr(torch.Tensor, "type", type_)  # noqa: B010


class _NullStream:
    """Stands for a CUDA stream: there is none, so there is nothing to wait for."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_NullStream":
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _NullEvent()

    def synchronize(self) -> None: ...


class _NullEvent:
    """Stands for a CUDA event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


@patch("timers, DDP, schedules and checkpointing ask torch.cuda for devices, streams, events and memory figures")
def cuda_module_answers() -> None:
    """Make torch.cuda answer as one device "cpu" without streams; is_available() stays False."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = cuda.default_stream = lambda device=None: _NullStream()
    cuda.set_stream = lambda stream: None
    cuda.stream = lambda stream: contextlib.nullcontext(stream)
    cuda.Stream, cuda.Event = _NullStream, _NullEvent
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.memory_stats = lambda device=None: {}
    for figure in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, figure, lambda device=None: 0)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.device_memory_used = lambda device=None: 0
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None


@patch("dropout, initialisation and recompute save and restore the CUDA generator")
def cuda_rng_is_cpu_rng() -> None:
    """Let the CUDA random state be the CPU's: seeds, the RNG tracker and recompute then work as on a device."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.default_generators = (torch.default_generator,)

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


@patch("jit_fuser is torch.compile, which takes minutes of C++ compilation on CPU and gains nothing there")
def no_compile() -> None:
    """Run functions marked for torch.compile eagerly."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch._dynamo.config

    torch._dynamo.config.disable = True


@patch("gloo requires all_to_all_single's split sizes as ints; the token dispatcher passes arrays and tensors")
def gloo_split_sizes_are_ints() -> None:
    """Turn numpy and tensor split sizes into lists of int before all_to_all_single."""
    all_to_all_single = torch.distributed.all_to_all_single

    def ints(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    @functools.wraps(all_to_all_single)
    def call(output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any):
        return all_to_all_single(output, input, ints(output_split_sizes), ints(input_split_sizes), **kwargs)

    setattr(torch.distributed, "all_to_all_single", call)  # noqa: B010


@patch("gloo requires equal parts in all_gather and reduce_scatter; experts under TP hand over unequal ones")
def gloo_takes_unequal_parts() -> None:
    """Gather and reduce-scatter parts of unequal length in the first dimension through all_to_all_single."""
    distributed: Any = torch.distributed
    all_gather, reduce_scatter = distributed.all_gather, distributed.reduce_scatter

    @functools.wraps(all_gather)
    def gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        sizes = [len(part) for part in tensor_list]
        if len(set(sizes)) == 1:
            return all_gather(tensor_list, tensor, group=group, **kwargs)
        received = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
        sent = torch.cat([tensor] * len(sizes))
        distributed.all_to_all_single(received, sent, sizes, [len(tensor)] * len(sizes), group=group)
        for part, gathered in zip(tensor_list, received.split(sizes), strict=True):
            part.copy_(gathered)

    @functools.wraps(reduce_scatter)
    def scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, group: Any = None, **kwargs: Any):
        sizes = [len(part) for part in input_list]
        if len(set(sizes)) == 1:
            return reduce_scatter(output, input_list, *args, group=group, **kwargs)
        received = output.new_empty((len(sizes), *output.shape))
        mine = [len(output)] * len(sizes)
        distributed.all_to_all_single(received.flatten(0, 1), torch.cat(input_list), mine, sizes, group=group)
        output.copy_(received.sum(dim=0))

    distributed.all_gather, distributed.reduce_scatter = gather, scatter


# ---------------------------------------------------------------- megatron


@patch("pretrain() asserts torch.cuda.is_available() in initialize_megatron()")
def initialize_without_cuda() -> None:
    """Call initialize_megatron with allow_no_cuda, and let the CPU count as the one device of each rank."""
    from megatron.training import initialize, training

    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # _initialize_distributed() sets up model parallelism only where device_count() > 0
    torch.cuda.device_count = lambda: 1


@patch("validate_args() asks device 0 for its architecture where TP > 1: up to 9 it requires one hardware queue")
def no_hardware_queues() -> None:
    """Answer with an architecture of which Megatron-LM requires nothing (10, Blackwell)."""
    from megatron.training import arguments

    arguments.get_device_arch_version = lambda: 10


@patch("the wheel has no Makefile for the dataset helpers: compile_helpers() would end the process")
def no_dataset_compilation() -> None:
    """Skip the compilation; the wheel ships the compiled helpers."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


@patch("set_jit_fusion_options() warms fused kernels up on the device")
def no_kernel_warmup() -> None:
    """Skip the warm-up of kernels that are not there."""
    from megatron.training import training

    training.set_jit_fusion_options = lambda tp_size=None: None


@patch("tensor_parallel/random.py uses three names of Transformer Engine that it imports only where TE is installed")
def names_of_transformer_engine() -> None:
    """Give tensor_parallel.random the names it misses; without FP8 they do nothing."""
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        return

    class NoFp8:
        is_fp8_enabled = staticmethod(lambda: False)
        get_fp8_recipe = staticmethod(lambda: None)

    random.FP8GlobalStateManager = NoFp8
    random.fp8_autocast = lambda enabled=False, fp8_recipe=None: contextlib.nullcontext()
    random.activation_recompute_forward = lambda activation_recompute, recompute_phase: contextlib.nullcontext()


@patch(
    "distrib_optimizer.py:839 requires the step of an optimizer that has not stepped yet when a checkpoint is loaded"
)
def optimizer_loads_before_its_first_step() -> None:
    """Let DistributedOptimizer.state_dict() say step 0 before the first step; only torch's own Adam needs that."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    plain = distrib_optimizer.DistributedOptimizer.state_dict

    @functools.wraps(plain)
    def state_dict(self: Any) -> Any:
        state = self.optimizer.state
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if state or not parameters:
            return plain(self)
        state[parameters[0]] = {"step": torch.zeros(())}
        try:
            return plain(self)
        finally:
            state.clear()

    distrib_optimizer.DistributedOptimizer.state_dict = state_dict


@patch("distrib_optimizer.py:1225 copies into fp32 parameters, which are leaves; half precision has copies")
def optimizer_loads_without_grad() -> None:
    """Load the distributed optimizer's state under no_grad: here parameters are fp32 and their own main parameters."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.load_state_dict = torch.no_grad()(DistributedOptimizer.load_state_dict)


@patch("distrib_optimizer.py:1027, :1225 load one step tensor for all parameters, then overwrite it with 0")
def optimizer_steps_are_loaded() -> None:
    """Give every parameter its own step, as saved with its group; only torch's own Adam keeps steps by parameter."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    plain = DistributedOptimizer.load_state_dict

    @functools.wraps(plain)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        plain(self, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in self.optimizer.state.get(parameter, {}):
                    self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    DistributedOptimizer.load_state_dict = load_state_dict


def main() -> None:
    """Print the list of patches."""
    for patch_ in PATCHES:
        print(f"{patch_.name:28} {patch_.why}", file=sys.stdout)


if __name__ == "__main__":
    main()
