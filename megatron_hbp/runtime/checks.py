"""What Megatron-LM's arguments have to be together with a plan, and with packs of samples at all."""

from typing import Any

from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.runtime.options import HbpOptions


def feed_unit(args: Any) -> int:
    """What the local tokens of every micro-batch, a dummy's too, must be a multiple of.

    Under sequence parallelism tensor-parallel ranks cut them evenly, and quantised GEMMs take rows in blocks: 16 for
    FP8, 32 for MXFP8, more for FP4.
    """
    from megatron.core.fp4_utils import get_fp4_align_size
    from megatron.core.fp8_utils import get_fp8_align_size

    unit: int = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if args.fp8:
        unit *= get_fp8_align_size(args.fp8_recipe)
    elif args.fp4:
        unit *= get_fp4_align_size(args.fp4_recipe)
    return unit


def shapes_vary(args: Any, options: HbpOptions) -> bool:
    """Whether pipeline stages exchange tensors of other shapes from micro-batch to micro-batch.

    Megatron-LM 0.19.2 has the setting (`variable_seq_lengths`) but no flag for it.
    """
    return args.pipeline_model_parallel_size > 1 and {t.local_tokens for t in options.tiers} != {args.seq_length}


def check_layout(args: Any) -> None:
    """Raise ConfigError where experts don't fit into the ranks: Megatron-LM finds out after its groups are begun."""
    tp, ep, pp = args.expert_tensor_parallel_size, args.expert_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * ep * pp):
        raise ConfigError(
            f"{args.world_size} ranks cannot be divided into {tp} expert tensor-parallel x {ep} expert-parallel x {pp} "
            f"pipeline ranks: give --expert-tensor-parallel-size 1, or other sizes"
        )


def check_plans(args: Any, options: HbpOptions) -> None:
    """Raise ConfigError or PlanError where values of Megatron-LM's arguments contradict the plans."""
    assert options.train is not None
    plan, words = options.train.plan, options.train.store.manifest.tokenizer.vocab_size
    if plan.num_ranks != args.data_parallel_size:
        raise PlanError(
            f"the plan is for {plan.num_ranks} data-parallel ranks, this run has {args.data_parallel_size} (world "
            f"{args.world_size} / TP {args.tensor_model_parallel_size} / PP {args.pipeline_model_parallel_size}): "
            f"make it again with `hbp plan --ranks {args.data_parallel_size}`"
        )
    if args.train_iters > plan.num_steps:
        raise PlanError(f"--train-iters {args.train_iters} exceeds the plan's {plan.num_steps} steps")
    if args.vocab_size is not None and args.vocab_size < words:
        raise ConfigError(f"--vocab-size {args.vocab_size} is less than the {words} words of --hbp-store's tokenizer")
    if args.eval_iters and options.valid is None:
        raise ConfigError(f"--eval-iters {args.eval_iters} needs held-out samples: give --hbp-valid-plan")
    for part in options.data:
        if part.plan.schedule != "lockstep":
            _check_gang(args)
    if args.pipeline_model_parallel_size > 1:
        _check_stages(args, options)


def _check_stages(args: Any, options: HbpOptions) -> None:
    lengths, unit = sorted({tier.local_tokens for tier in options.tiers}), feed_unit(args)
    if not shapes_vary(args, options):
        if args.seq_length % unit:
            raise ConfigError(
                f"pipeline stages exchange {args.seq_length} local tokens, which is no multiple of {unit} (tensor and "
                f"sequence parallelism, FP8): plan tiers with other packing lengths"
            )
        return
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError(
            f"interleaved pipeline stages exchange fixed shapes: give all tiers the same local tokens (they have "
            f"{lengths}, --seq-length is {args.seq_length}), or leave out --num-layers-per-virtual-pipeline-stage and "
            f"--num-virtual-stages-per-pipeline-rank"
        )
    if args.num_experts and args.moe_token_dispatcher_type == "allgather":
        raise ConfigError(
            f"--moe-token-dispatcher-type allgather needs tiers with the same local tokens (they have {lengths}) "
            f"under pipeline parallelism: use alltoall"
        )


def _check_gang(args: Any) -> None:
    """Ranks of a gang schedule run unequal numbers of micro-batches: nothing else may make them meet inside a step."""
    for flag, is_set, meeting in (
        ("--pipeline-model-parallel-size", args.pipeline_model_parallel_size > 1, "pipeline stages"),
        ("--num-experts", args.num_experts, "experts"),
        ("--overlap-grad-reduce", args.overlap_grad_reduce, "gradient buckets, in another order than the gangs,"),
        ("--overlap-param-gather", args.overlap_param_gather, "parameter gathers, in another order than the gangs,"),
    ):
        if is_set:
            raise ConfigError(
                f"{flag} cannot be used with a plan of schedule 'gang': {meeting} would make ranks meet inside a step; "
                f"drop it, or plan with --schedule lockstep"
            )
