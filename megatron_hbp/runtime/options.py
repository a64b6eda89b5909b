"""Our flags (`--hbp-*`), read once; the Megatron-LM flags that follow from a plan."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.machine import H100, Machine
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Kernel, Tier
from megatron_hbp.runtime.refusals import misuse

Flags = Mapping[str, dict[str, Any]]
"""Flag -> keywords of `add_argument`. Strings, not paths: Megatron-LM saves them in checkpoints."""
AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Megatron-LM's `extra_args_provider`."""

FLAGS: Flags = {
    "--hbp-plan": {"help": "plan file: which rank runs which samples in which micro-batch"},
    "--hbp-store": {"help": "token store that the plan schedules"},
    "--hbp-valid-plan": {"help": "plan of the held-out samples, for evaluation"},
    "--hbp-valid-store": {"help": "token store of the held-out samples"},
    "--hbp-exchange": {
        "choices": tuple(EXCHANGES),
        "help": "what the ranks of a pack exchange in attention, for all tiers; without it the tier's, or the cheapest",
    },
    "--hbp-kernel": {
        "choices": get_args(Kernel),
        "help": "attention kernel; without it the first that is installed",
    },
    "--hbp-node-bandwidth": {
        "type": float,
        "default": 129.0,
        "help": "GB/s a rank receives inside a node (H100: 129)",
    },
    "--hbp-cluster-bandwidth": {
        "type": float,
        "default": 45.0,
        "help": "GB/s a rank receives across nodes (default 45)",
    },
    "--hbp-read-ahead": {
        "type": int,
        "default": 2,
        "help": "micro-batches prepared in a thread while another one runs; 0 prepares each when it is asked for",
    },
    "--hbp-metrics": {
        "help": "where one JSON line per step, and a summary per tier, are written; without it DIR/metrics.jsonl of "
        "--save DIR"
    },
}


def add_flags(parser: argparse.ArgumentParser, title: str, about: str, flags: Flags) -> None:
    """Add a group of flags."""
    group = parser.add_argument_group(title, about)
    for flag, keywords in flags.items():
        group.add_argument(flag, **keywords)


def add_hbp_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`; a mistake in any flag is then a ConfigError."""
    about = (
        "Train on a plan made by `hbp plan` from a token store made by `hbp prepare`. Without --hbp-plan this program "
        "is plain Megatron-LM. A plan sets the batch size, the sequence length, the per-token loss, the vocabulary "
        "size and zero dropout; flags that contradict it are refused."
    )
    add_flags(parser, "hierarchical balance packing", about, FLAGS)
    _repair_help(parser)
    parser.error = misuse  # type: ignore[method-assign]
    return parser


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape the bare percent signs in Megatron-LM's help texts (0.19.2 has some): argparse dies of them in --help."""
    for action in parser._actions:
        action.help = action.help and re.sub(r"(?<!%)%(?![(%])", "%%", action.help)


def read_own(argv: Sequence[str], add_arguments: AddArguments) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments and --save from a command line that has others too, and which of ours are not at their defaults."""
    parser = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    parser.add_argument("--save")
    args, _ = parser.parse_known_args(list(argv))
    changed = [name for name, value in vars(args).items() if value != parser.get_default(name) and name != "save"]
    return args, [f"--{name.replace('_', '-')}" for name in changed]


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
    """Our options, read before Megatron-LM reads the whole line, and passed on from there."""

    flags: Mapping[str, Any]
    """Our arguments, for the record of the run."""
    train: PlannedData | None = None
    valid: PlannedData | None = None
    exchange: str | None
    kernel: Kernel | None
    machine: Machine
    """With the links that the flags say."""
    read_ahead: int
    metrics: Path | None
    run_dir: Path | None
    """Megatron-LM's --save: checkpoints, metrics and the record of the run."""

    @staticmethod
    def of(args: Any, **loaded: Any) -> "HbpOptions":
        """From arguments that `read_own` has read, and what has been `loaded`: plans."""
        args.hbp_metrics = args.hbp_metrics or (args.save and f"{args.save}/metrics.jsonl")
        node, cluster = args.hbp_node_bandwidth * 1e9, args.hbp_cluster_bandwidth * 1e9
        return HbpOptions(
            flags={name: value for name, value in vars(args).items() if name.startswith("hbp_")},
            exchange=args.hbp_exchange, kernel=args.hbp_kernel, read_ahead=args.hbp_read_ahead,
            metrics=Path(args.hbp_metrics) if args.hbp_metrics else None,
            machine=replace(H100, node_bandwidth=node, cluster_bandwidth=cluster),
            run_dir=Path(args.save) if args.save else None, **loaded,
        )  # fmt: skip

    @staticmethod
    def from_argv(argv: Sequence[str]) -> "HbpOptions":
        """Read `--hbp-*` and `--save`; opens plans and stores.

        Raises:
            HbpError: a file that cannot be used, or flags that don't go together.
        """
        args, changed = read_own(argv, add_hbp_arguments)
        if args.hbp_plan is None:
            if changed:
                raise ConfigError(f"{changed[0]} needs --hbp-plan")
            return HbpOptions.of(args)
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
        return HbpOptions.of(args, train=train, valid=valid)

    @property
    def data(self) -> list[PlannedData]:
        """The training data, then the held-out ones where there are any."""
        return [part for part in (self.train, self.valid) if part is not None]

    @property
    def tiers(self) -> list[Tier]:
        """Those of all plans."""
        return [tier for part in self.data for tier in part.plan.tiers]


def packed_flags(**flags: Any) -> list[str]:
    """Megatron-LM's flags that packs imply, and further ones (`train_iters=1` for --train-iters 1)."""
    implied = {
        "micro_batch_size": 1,
        "dataloader_type": "external",
        "position_embedding_type": "rope",
        "attention_dropout": 0,
        "hidden_dropout": 0,
        "tokenizer_type": "NullTokenizer",
        **flags,
    }
    words = [word for name, value in implied.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, "--calculate-per-token-loss"]


def planned_flags(options: HbpOptions) -> list[str]:
    """Megatron-LM's flags that follow from a plan; they go before the user's, so that the user's win."""
    assert options.train is not None
    plan, store = options.train.plan, options.train.store
    return packed_flags(
        global_batch_size=plan.num_ranks * plan.max_micro_batches,
        train_iters=plan.num_steps,
        seq_length=max(tier.local_tokens for tier in plan.tiers),
        max_position_embeddings=max(tier.packing_length for tier in plan.tiers),
        eval_iters=options.valid.plan.num_steps if options.valid else 0,
        eval_interval=plan.num_steps + 1,  # once, after the last step
        vocab_size=store.manifest.tokenizer.vocab_size,
    )
