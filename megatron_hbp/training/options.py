"""Our flags (`--hbp-*`), the Megatron-LM flags that a plan implies, and what goes together."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Kernel
from megatron_hbp.runtime.refusals import misuse


def add_hbp_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`. Strings, not paths: Megatron-LM saves them in checkpoints."""
    group = parser.add_argument_group(
        "hierarchical balance packing",
        "Train on a plan made by `hbp plan` from a token store made by `hbp prepare`. Without --hbp-plan this program "
        "is plain Megatron-LM. A plan sets the batch size, the iterations, the sequence length, the vocabulary size, "
        "the per-token loss and zero dropout unless flags say otherwise.",
    )
    group.add_argument("--hbp-plan", help="plan file: which rank runs which samples in which micro-batch")
    group.add_argument("--hbp-store", help="token store that the plan schedules")
    group.add_argument("--hbp-valid-plan", help="plan of the held-out samples, for evaluation")
    group.add_argument("--hbp-valid-store", help="token store of the held-out samples")
    group.add_argument(
        "--hbp-exchange",
        choices=tuple(EXCHANGES),
        help="what the ranks of a pack exchange in attention, for all tiers; left out, the tier's own or the cheapest",
    )
    group.add_argument(
        "--hbp-kernel", choices=get_args(Kernel), help="attention kernel; left out, the first that is installed"
    )
    group.add_argument(
        "--hbp-node-bandwidth", type=float, default=129.0, help="GB/s a rank receives inside a node (H100: 129)"
    )
    group.add_argument(
        "--hbp-cluster-bandwidth", type=float, default=45.0, help="GB/s a rank receives across nodes (default 45)"
    )
    group.add_argument(
        "--hbp-read-ahead",
        type=int,
        default=2,
        help="micro-batches prepared in a thread while another one runs; 0 prepares each when it is asked for",
    )
    group.add_argument("--hbp-metrics", help="write one JSON line a step, and a summary per tier, here")
    _repair_help(parser)
    parser.error = misuse  # type: ignore[method-assign]
    return parser


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape the bare percent signs in Megatron-LM's help texts (0.19.2 has some): argparse dies of them in --help."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """A plan and the store it belongs to."""

    plan: Plan
    store: TokenStore

    @staticmethod
    def load(plan_path: str, store_path: str | None, flag: str) -> "PlannedData":
        """Open both and check that they belong together; `flag` names the plan's option in messages."""
        if store_path is None:
            raise ConfigError(f"{flag} {plan_path} needs its token store: give {flag.replace('plan', 'store')} DIR")
        plan, store = planfile.load(Path(plan_path)), TokenStore.open(Path(store_path))
        planfile.check_data(plan, Samples.of(store.lengths, store_fingerprint=store.fingerprint))
        return PlannedData(plan=plan, store=store)


@dataclass(frozen=True, kw_only=True)
class HbpOptions:
    """Our own flags, read before Megatron-LM reads the whole line."""

    train: PlannedData | None
    valid: PlannedData | None
    metrics: Path | None

    @staticmethod
    def from_argv(argv: list[str]) -> "HbpOptions":
        """Read `--hbp-*` from a command line that has other flags too; opens plans and stores."""
        parser = add_hbp_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        args, _ = parser.parse_known_args(argv)
        if args.hbp_plan is None:
            stray = [name for name, value in vars(args).items() if value != parser.get_default(name)]
            if stray:
                raise ConfigError(f"--{stray[0].replace('_', '-')} needs --hbp-plan")
            return HbpOptions(train=None, valid=None, metrics=None)
        if args.hbp_read_ahead < 0:
            raise ConfigError(f"--hbp-read-ahead {args.hbp_read_ahead} is below 0: give a number of micro-batches or 0")
        train = PlannedData.load(args.hbp_plan, args.hbp_store, "--hbp-plan")
        valid = None
        if args.hbp_valid_plan is not None:
            valid = PlannedData.load(args.hbp_valid_plan, args.hbp_valid_store, "--hbp-valid-plan")
            if valid.plan.num_ranks != train.plan.num_ranks:
                raise PlanError(
                    f"--hbp-plan is for {train.plan.num_ranks} data-parallel ranks, --hbp-valid-plan for "
                    f"{valid.plan.num_ranks}: make both with the same `hbp plan --ranks`"
                )
        return HbpOptions(train=train, valid=valid, metrics=Path(args.hbp_metrics) if args.hbp_metrics else None)


def implied_flags(options: HbpOptions) -> list[str]:
    """Megatron-LM flags that follow from a plan; they go before the user's, so that the user's win."""
    assert options.train is not None
    plan, store = options.train.plan, options.train.store
    flags: dict[str, Any] = {
        "--micro-batch-size": 1,
        "--global-batch-size": plan.num_ranks * plan.max_micro_batches,
        "--train-iters": plan.num_steps,
        "--seq-length": max(tier.local_tokens for tier in plan.tiers),
        "--max-position-embeddings": max(tier.packing_length for tier in plan.tiers),
        "--dataloader-type": "external",
        "--position-embedding-type": "rope",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--eval-iters": options.valid.plan.num_steps if options.valid else 0,
        "--eval-interval": plan.num_steps + 1,  # once, after the last step
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": store.manifest.tokenizer.vocab_size,
    }
    return [str(word) for pair in flags.items() for word in pair] + ["--calculate-per-token-loss"]


def check_layout(args: Any) -> None:
    """Raise ConfigError where experts don't fit into the ranks: Megatron-LM finds out after its groups are begun."""
    tp, ep, pp = args.expert_tensor_parallel_size, args.expert_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * ep * pp):
        raise ConfigError(
            f"{args.world_size} ranks cannot be divided into {tp} expert tensor-parallel x {ep} expert-parallel x {pp} "
            f"pipeline ranks: give --expert-tensor-parallel-size 1, or other sizes"
        )


def check_together(args: Any, options: HbpOptions) -> None:
    """Raise ConfigError or PlanError where Megatron-LM's flags contradict the plan."""
    assert options.train is not None
    plan = options.train.plan
    check_layout(args)
    if plan.num_ranks != args.data_parallel_size:
        raise PlanError(
            f"the plan is for {plan.num_ranks} data-parallel ranks, this run has {args.data_parallel_size} (world "
            f"{args.world_size} / TP {args.tensor_model_parallel_size} / PP {args.pipeline_model_parallel_size}): "
            f"make it again with `hbp plan --ranks {args.data_parallel_size}`"
        )
    if args.train_iters > plan.num_steps:
        raise PlanError(f"--train-iters {args.train_iters} exceeds the plan's {plan.num_steps} steps")
    words = options.train.store.manifest.tokenizer.vocab_size
    if args.vocab_size is not None and args.vocab_size < words:
        raise ConfigError(f"--vocab-size {args.vocab_size} is less than the {words} words of --hbp-store's tokenizer")
    if args.eval_iters and options.valid is None:
        raise ConfigError(f"--eval-iters {args.eval_iters} needs held-out samples: give --hbp-valid-plan")
    for part in (options.train, options.valid):
        if part is not None and part.plan.schedule != "lockstep":
            _check_gang(args)
    if not shapes_vary(args, options):
        if args.pipeline_model_parallel_size > 1 and args.seq_length % feed_unit(args):
            raise ConfigError(
                f"pipeline stages exchange {args.seq_length} local tokens, which is no multiple of {feed_unit(args)} "
                f"(tensor and sequence parallelism, FP8): plan tiers with other packing lengths"
            )
        return
    lengths = _stage_lengths(options)
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


def build_for_every_policy(args: Any, options: HbpOptions) -> None:
    """Have the model built for all modules that any tier recomputes; each micro-batch then uses its own tier's.

    FP8 layers decide at construction what they save for the backward, and Megatron-LM checks modules against the model
    where the config is made.
    """
    parts = [part for part in (options.train, options.valid) if part is not None]
    modules = sorted({name for part in parts for tier in part.plan.tiers for name in tier.recompute.modules})
    if modules:
        args.recompute_granularity, args.recompute_modules = "selective", modules


def without_fused_mla_rotary(args: Any) -> list[str]:
    """Turn rope fusion off where a packed model cannot have it, before Megatron-LM makes (or refuses) the config.

    On is Megatron-LM's default with CUDA, and there is no flag to ask for it. Returns lines for the log.
    """
    if not (args.multi_latent_attention and args.apply_rope_fusion):
        return []
    args.apply_rope_fusion = False
    return ["rope fusion is off: Megatron-LM's kernel for latent attention knows no positions inside a pack"]


def feed_unit(args: Any) -> int:
    """What the local tokens of every micro-batch, a dummy's too, must be a multiple of.

    Under sequence parallelism tensor-parallel ranks cut them evenly, and quantised GEMMs take rows in blocks: 16 for
    FP8, 32 for MXFP8, more for FP4.
    """
    unit = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if args.fp8:
        from megatron.core.fp8_utils import get_fp8_align_size

        return unit * get_fp8_align_size(args.fp8_recipe)
    if args.fp4:
        from megatron.core.fp4_utils import get_fp4_align_size

        return unit * get_fp4_align_size(args.fp4_recipe)
    return unit


def shapes_vary(args: Any, options: HbpOptions) -> bool:
    """Whether pipeline stages exchange tensors of other shapes from micro-batch to micro-batch.

    Megatron-LM 0.19.2 has the setting (`variable_seq_lengths`) but no flag for it.
    """
    return args.pipeline_model_parallel_size > 1 and _stage_lengths(options) != [args.seq_length]


def _stage_lengths(options: HbpOptions) -> list[int]:
    """The local tokens that the tiers of both plans have, each once."""
    parts = [part for part in (options.train, options.valid) if part is not None]
    return sorted({tier.local_tokens for part in parts for tier in part.plan.tiers})


def describe(options: HbpOptions) -> str:
    """One line for the log."""
    assert options.train is not None
    plan = options.train.plan
    return json.dumps(
        {"plan": plan.hash, "tiers": [str(t) for t in plan.tiers], "ranks": plan.num_ranks, "steps": plan.num_steps}
    )
