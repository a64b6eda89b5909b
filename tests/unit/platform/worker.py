"""Runs in a process of its own, without CUDA: every patch of the platform layer, asked for what Megatron-LM asks for.

One function a patch, of the same name (or `case_of` several). Each runs twice: before `cpu.apply()`, where it must fail
(else the patch is no longer needed), and after it, where it must pass. Prints {name: {"before": error or "", "after":
error or ""}}.
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_hbp.platform import cpu

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def case_of(*patches: str) -> Callable[[Callable[[], None]], None]:
    """A case that needs several patches at once."""

    def register(function: Callable[[], None]) -> None:
        CASES.update(dict.fromkeys(patches, function))

    return register


@case
def factories_on_cpu() -> None:
    cuda = torch.device("cuda", 0)
    like = torch.ones(2, 3)
    made = {
        "tensor": torch.tensor([1.0, 2.0], device="cuda"),
        "empty": torch.empty(3, device=cuda).fill_(1),
        "zeros": torch.zeros(2, device="cuda:0", dtype=torch.int32),
        "ones": torch.ones(2, device=cuda),
        "full": torch.full((2,), 7, device="cuda"),
        "arange": torch.arange(4, device=cuda),
        "as_tensor": torch.as_tensor(np.arange(3), device="cuda"),
        "eye": torch.eye(2, device="cuda"),
        "linspace": torch.linspace(0, 1, 3, device="cuda"),
        "zeros_like": torch.zeros_like(like, device="cuda"),
        "ones_like": torch.ones_like(like, device="cuda"),
        "full_like": torch.full_like(like, 2.0, device="cuda"),
        "empty_like": torch.empty_like(like, device="cuda").fill_(3),
    }
    assert all(tensor.device.type == "cpu" for tensor in made.values())
    assert made["tensor"].tolist() == [1, 2] and made["tensor"].dtype == torch.float32
    assert made["zeros"].tolist() == [0, 0] and made["zeros"].dtype == torch.int32
    assert made["full"].tolist() == [7, 7] and made["arange"].tolist() == [0, 1, 2, 3]
    assert made["as_tensor"].tolist() == [0, 1, 2] and made["linspace"].tolist() == [0, 0.5, 1]
    assert made["eye"].tolist() == [[1, 0], [0, 1]] and made["full_like"].tolist() == [[2.0] * 3] * 2
    assert made["zeros_like"].sum() == 0 and made["ones_like"].sum() == made["empty_like"].sum() / 3 == 6

    torch.manual_seed(3)
    drawn = torch.randn(4), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda"), drawn[0]) and torch.equal(torch.rand(4, device="cuda"), drawn[1])
    assert not torch.zeros(1, pin_memory=True).is_pinned()
    assert torch.ones(1, device="meta").device.type == "meta"  # other devices are none of our business


@case
def moves_stay_on_cpu() -> None:
    x = torch.randn(3, requires_grad=True)
    for moved in (x.cuda(), x.cuda(non_blocking=True), x.to("cuda"), x.to(0), x.to(torch.device("cuda:0"))):
        assert moved.device.type == "cpu" and torch.equal(moved, x)
    half = x.to("cuda", torch.bfloat16), x.to(device="cuda", dtype=torch.bfloat16), x.to(torch.bfloat16)
    assert all(torch.equal(h, x.bfloat16()) for h in half)
    assert x.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    (x.to("cuda") * 2).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]

    module = torch.nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    assert module.cuda() is module and module.to("cuda") is module and module.to(torch.device("cuda")) is module
    assert module.weight.device.type == "cpu" and torch.equal(module.weight, weight)
    assert module.to(torch.float64).weight.dtype == torch.float64


@case
def type_names_say_cuda() -> None:
    names = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float64: "Double"}
    for dtype, name in names.items():
        assert torch.ones(2, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
    x = torch.tensor([1.5, 2.5])
    assert x.type(torch.int64).tolist() == [1, 2] and x.type("torch.DoubleTensor").dtype == torch.float64
    assert x.type_as(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@case
def cuda_module_answers() -> None:
    cuda = torch.cuda
    assert cuda.current_device() == "cpu" and torch.device(cuda.current_device()).type == "cpu"
    assert not cuda.is_available()  # Megatron-LM may still see that there is no device
    cuda.set_device(0)
    cuda.synchronize()
    cuda.empty_cache()
    stream, event = cuda.Stream(), cuda.Event(enable_timing=True)
    with cuda.stream(stream):
        stream.wait_stream(cuda.current_stream())
        event.record()
        event.record(stream)
    cuda.current_stream().wait_event(event)
    cuda.default_stream().synchronize()
    cuda.set_stream(stream)
    stream.record_event().synchronize()
    with stream:
        event.wait(stream)
    assert event.query() and event.elapsed_time(cuda.Event()) == 0
    assert cuda.get_device_capability() == (0, 0) and not cuda.is_current_stream_capturing()
    figures = (cuda.memory_allocated, cuda.max_memory_allocated, cuda.memory_reserved, cuda.max_memory_reserved)
    assert [figure() for figure in figures] == [0, 0, 0, 0] and cuda.memory_stats() == {}
    assert cuda.device_memory_used() == 0
    cuda.reset_peak_memory_stats()
    cuda.nvtx.range_push("x")
    cuda.nvtx.range_pop()


@case
def cuda_rng_is_cpu_rng() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.randn(3), expected)
    for get, set_ in (
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        (random._get_cuda_rng_state, random._set_cuda_rng_state),
    ):
        state = get()
        first = torch.randn(3)
        set_(state)
        assert torch.equal(torch.randn(3), first)
    assert torch.cuda.default_generators[0] is torch.default_generator

    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 11)
    outside = torch.cuda.get_rng_state()
    with tracker.fork("a"):
        forked = torch.randn(3)
    assert torch.equal(torch.cuda.get_rng_state(), outside)
    torch.manual_seed(11)
    assert torch.equal(torch.randn(3), forked)

    # recompute draws the same dropout mask again, also in the thread of the backward
    x = torch.ones(64, requires_grad=True)
    out = tensor_parallel.checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5) * t, False, x)
    kept = torch.ne(out.detach(), 0)
    out.sum().backward()
    assert x.grad is not None
    assert 8 < kept.sum() < 56 and torch.equal(torch.ne(x.grad, 0), kept)


@case
def no_compile() -> None:
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    assert torch.compile(lambda t: t * 2 + 1, backend=backend)(torch.tensor([3.0])).tolist() == [7]
    assert not compiled


def one_gloo_rank() -> None:
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


@case
def gloo_split_sizes_are_ints() -> None:
    one_gloo_rank()
    sent = torch.arange(6.0).reshape(3, 2)
    for out_sizes, in_sizes in ((np.array([3]), torch.tensor([3])), (torch.tensor([3]), [3]), (None, None)):
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, out_sizes, in_sizes, group=dist.group.WORLD)
        assert torch.equal(received, sent)
        received.zero_()
        dist.all_to_all_single(received, sent, output_split_sizes=out_sizes, input_split_sizes=in_sizes)
        assert torch.equal(received, sent)


@case
def gloo_takes_unequal_parts() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(unequal_parts, args=(folder, cpu._applied), nprocs=2)


def unequal_parts(rank: int, folder: str, patched: bool) -> None:
    """On each of two ranks, in processes of their own."""
    if patched:
        cpu.apply()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for sizes in ([3, 1], [0, 2], [2, 2]):
        whole = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
        parts = whole.split(sizes)
        gathered = torch.zeros_like(whole)
        dist.all_gather(list(gathered.split(sizes)), parts[rank], group=dist.group.WORLD)
        assert torch.equal(gathered, whole)
        reduced = torch.zeros_like(parts[rank])
        dist.reduce_scatter(reduced, [part * (1 + rank) for part in parts], group=dist.group.WORLD)
        assert torch.equal(reduced, parts[rank] * 3)
    dist.destroy_process_group()


@case
def initialize_without_cuda() -> None:
    from megatron.training import training

    assert torch.cuda.device_count() == 1
    try:  # nothing is set up here: it must come past "Megatron requires CUDA" and end at the missing arguments
        training.initialize_megatron(get_embedding_ranks=None)
    except AssertionError as error:
        assert "args is not initialized" in str(error), error


@case
def no_hardware_queues() -> None:
    from megatron.training import arguments

    source = inspect.getsource(arguments.validate_args)
    assert "get_device_arch_version() < 10" in source  # by this name, and with this bound
    assert arguments.get_device_arch_version() >= 10


@case
def no_dataset_compilation() -> None:
    from megatron.core.datasets import helpers_cpp, utils

    assert utils.compile_helpers() is None
    assert callable(helpers_cpp.build_blending_indices)  # the wheel's compiled helpers are there


@case
def no_kernel_warmup() -> None:
    from megatron.training import training

    assert training.set_jit_fusion_options() is None


@case
def names_of_transformer_engine() -> None:
    from megatron.core.tensor_parallel import random

    assert not random.HAVE_TE
    assert random.FP8GlobalStateManager.is_fp8_enabled() is False

    # CheckpointWithoutOutput uses all three names
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    plain = torch.autograd.grad((weight * x.exp()).sin().sum(), (x, weight))
    recompute = random.CheckpointWithoutOutput()
    inner = recompute.checkpoint(lambda t: weight * t.exp(), x)
    out = inner.sin()
    recompute.discard_output_and_register_recompute(out)
    assert inner.untyped_storage().nbytes() == 0
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, plain[0])
    assert weight.grad is not None and torch.equal(weight.grad, plain[1])


@case_of("optimizer_loads_before_its_first_step", "optimizer_loads_without_grad", "optimizer_steps_are_loaded")
def distributed_optimizer_resumes() -> None:
    """Two steps, save, load into a new optimizer, two steps: the parameters of four steps."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    one_gloo_rank()
    folder = tempfile.mkdtemp()

    def make() -> tuple[DistributedDataParallel, Any]:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
        model = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), layers)
        settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, weight_decay=0.1)
        return model, get_megatron_optimizer(settings, [model])

    def state(model: DistributedDataParallel, optimizer: Any, **loading: bool) -> Any:
        of = dist_checkpointing.ShardedTensor.from_rank_offsets
        parameters = {name: of(name, p, replica_id=(0, 0, 0)) for name, p in model.named_parameters()}
        metadata = {"distrib_optim_sharding_type": "dp_reshardable"}  # as megatron.training saves
        return optimizer.sharded_state_dict(parameters, metadata=metadata, **loading)

    def steps(model: DistributedDataParallel, optimizer: Any, inputs: range) -> list[torch.Tensor]:
        for i in inputs:
            model.zero_grad_buffer()
            model(torch.full((1, 4), 1.0 + i)).square().sum().backward()
            model.finish_grad_sync()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    straight = steps(*make(), range(4))
    model, optimizer = make()
    halfway = steps(model, optimizer, range(2))
    dist_checkpointing.save(state(model, optimizer), folder)

    model, optimizer = make()
    for mine, saved in zip(model.parameters(), halfway, strict=True):
        mine.data.copy_(saved)
    optimizer.load_state_dict(dist_checkpointing.load(state(model, optimizer, is_loading=True), folder))
    assert all(torch.equal(a, b) for a, b in zip(steps(model, optimizer, range(2, 4)), straight, strict=True))


def outcome(function: Callable[[], None]) -> str:
    """Empty where the function passed, else its error."""
    try:
        function()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcomes() -> dict[str, str]:
    """The outcome of every patch's case."""
    by_case = {function: outcome(function) for function in CASES.values()}
    return {name: by_case[function] for name, function in CASES.items()}


def main() -> None:
    before = outcomes()
    cpu.apply()
    zeros = torch.zeros
    cpu.apply()
    assert torch.zeros is zeros  # twice is once
    after = outcomes()
    results = {name: {"before": before[name], "after": after[name]} for name in CASES}

    from megatron.training.arguments import parse_args

    sys.argv[1:] = list(cpu.FLAGS)
    args = parse_args()  # ends the process where a flag is unknown
    results["flags"] = {"backend": args.distributed_backend, "impl": args.transformer_impl}
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
