"""The flags of `hbp profile`, the Megatron-LM flags that they imply."""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.cost.file import cost_file_of
from megatron_hbp.profiling.grid import parse_numbers
from megatron_hbp.runtime.options import Flags, HbpOptions, add_flags, add_hbp_arguments, packed_flags, read_own

PROGRAM = "hbp profile"
FLAGS: Flags = {
    "--hbp-profile-lengths": {"default": "4096,8192,16384,32768,65536", "help": "packing lengths, tokens"},
    "--hbp-profile-cp": {"help": "CP degrees; left out, the powers of two that divide the ranks, to 8"},
    "--hbp-profile-recompute": {
        "help": "policies as in tiers: none,full16,sel=core_attn; left out none, half, all",
    },
    "--hbp-profile-out": {"default": "profile.json", "help": "profile table; FILE.cost.json lies beside it"},
    "--hbp-profile-memory": {"type": float, "help": "GiB that may be used; left out, all of a CUDA device"},
    "--hbp-profile-most-local": {"type": int, "help": "leave out settings with more tokens on a rank"},
    "--hbp-profile-seconds": {"type": float, "default": 1.0, "help": "seconds to repeat a row for (4-10 runs)"},
    "--hbp-profile-supervised": {"type": float, "default": 0.67, "help": "share of tokens with a loss"},
    "--hbp-profile-check": {"help": "a plan: time its packs too, and compare with what the fit says of them"},
    "--hbp-profile-patience": {
        "type": float,
        "default": 60.0,
        "help": "seconds a rank that is out of memory waits for the others before all are started anew",
    },
}
TRAINING = ("--hbp-plan", "--hbp-store", "--hbp-valid-plan", "--hbp-valid-store", "--hbp-read-ahead", "--hbp-metrics")
"""Flags of ours that a profile has no use for; it has some for kernel, exchange and bandwidths."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`."""
    add_flags(add_hbp_arguments(parser), "hbp profile", "What to measure, and where the table goes.", FLAGS)
    return parser


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The profile's own flags, read before Megatron-LM reads the whole line."""

    lengths: tuple[int, ...]
    cp_degrees: tuple[int, ...] | None
    recompute: str | None
    out: Path
    memory: float | None
    """Bytes."""
    most_local: int | None
    """Tokens on a rank beyond which nothing is run."""
    seconds: float
    supervised: float
    check: Path | None
    patience: float
    hbp: HbpOptions
    """Kernel, exchange and bandwidths, as for training."""

    @staticmethod
    def from_argv(argv: Sequence[str]) -> "ProfileOptions":
        """Read `--hbp-*` from a command line that has other flags too. Raises ConfigError."""
        args, changed = read_own(argv, add_arguments)
        for flag in set(TRAINING).intersection(changed):
            raise ConfigError(f"{flag} is for training: `hbp profile` makes its own data; leave it out")
        if not 0 < args.hbp_profile_supervised <= 1:
            raise ConfigError(f"--hbp-profile-supervised {args.hbp_profile_supervised}: a share above 0, at most 1")
        for name in ("seconds", "memory", "most_local", "patience"):
            value = getattr(args, f"hbp_profile_{name}")
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--hbp-profile-{name.replace('_', '-')} {value:g} must be above 0")
        return ProfileOptions(
            lengths=parse_numbers(args.hbp_profile_lengths, "--hbp-profile-lengths"),
            cp_degrees=parse_numbers(args.hbp_profile_cp, "--hbp-profile-cp") if args.hbp_profile_cp else None,
            recompute=args.hbp_profile_recompute,
            out=Path(args.hbp_profile_out),
            memory=args.hbp_profile_memory * 2**30 if args.hbp_profile_memory else None,
            most_local=args.hbp_profile_most_local,
            seconds=args.hbp_profile_seconds,
            supervised=args.hbp_profile_supervised,
            check=Path(args.hbp_profile_check) if args.hbp_profile_check else None,
            patience=args.hbp_profile_patience,
            hbp=HbpOptions.of(args),
        )

    @property
    def cost_file(self) -> Path:
        """Where the fitted cost model goes."""
        return cost_file_of(self.out)

    @property
    def failure_note(self) -> Path:
        """Where a rank that ran out of memory while others wait for it leaves its setting."""
        return self.out.with_name(f".{self.out.name}.out-of-memory")

    def degrees(self, num_ranks: int) -> tuple[int, ...]:
        """The CP degrees to run on so many data-parallel ranks. Raises ConfigError where one does not divide them."""
        degrees = self.cp_degrees or tuple(c for c in (1, 2, 4, 8) if num_ranks % c == 0)
        for c in degrees:
            if num_ranks % c:
                raise ConfigError(
                    f"--hbp-profile-cp {c} does not divide the {num_ranks} data-parallel ranks of this run"
                )
        return degrees


def implied_flags(options: ProfileOptions) -> list[str]:
    """Megatron-LM flags that a profile implies; they go before the user's, so that the user's win."""
    return packed_flags(
        train_iters=1_000_000,  # nothing is trained; learning-rate schedules must be shorter than this
        seq_length=max(options.lengths),
        max_position_embeddings=max(options.lengths),
        eval_iters=0,
        lr=1e-6,
        logging_level=30,  # warnings: the bar has the terminal
    )


def config_digest(config: Any, args: Any) -> str:
    """SHA-256 (hex) of every plain value of Megatron-LM's model config, and the vocabulary; recompute left out."""
    plain = (int, float, str, bool, type(None), list, tuple, dict)
    values = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if isinstance(getattr(config, f.name, ...), plain) and not f.name.startswith("recompute_")
    }
    values["vocabulary"] = args.padded_vocab_size
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
