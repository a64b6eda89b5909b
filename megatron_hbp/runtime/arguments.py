"""From a command line to Megatron-LM's arguments; what Megatron-LM refuses ends in one line, not in a traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_hbp.errors import ConfigError
from megatron_hbp.runtime.refusals import Table, refuse

MegatronRefusal = (AssertionError, ValueError, RuntimeError, ImportError)
"""What Megatron-LM raises where it doesn't take arguments, or a model made of them."""


def platform_flags() -> list[str]:
    """Apply the CPU platform layer where there is no CUDA device; with CUDA it isn't even imported."""
    if torch.cuda.is_available() and os.environ.get("HBP_PLATFORM") != "cpu":
        return []
    from megatron_hbp.platform import cpu

    cpu.apply()
    return list(cpu.FLAGS)


def parse(
    argv: Sequence[str],
    *,
    implied: Sequence[str],
    add_arguments: Callable[..., Any],
    subject: str,
    tables: Sequence[Table],
) -> Any:
    """Megatron-LM's arguments, validated, from `argv` and the flags that it implies.

    Megatron-LM is imported here for the first time: the platform layer goes before. It reads sys.argv, which is set.

    Args:
        argv: the user's command line; its flags win over implied ones.
        implied: Megatron-LM's flags that follow from our own.
        add_arguments: Megatron-LM's `extra_args_provider`.
        subject: what refused flags cannot be used with.
        tables: flags to refuse (refusals.py).

    Raises:
        ConfigError: flags that Megatron-LM, or a table, does not take.
    """
    sys.argv[1:] = [*platform_flags(), *implied, *argv]
    refuse(argv, implied, subject, *tables)
    from megatron.training.arguments import parse_and_validate_args

    try:
        return parse_and_validate_args(extra_args_provider=add_arguments)
    except MegatronRefusal as error:
        raise refused_by_megatron(error, "these flags") from error


def refused_by_megatron(error: BaseException, what: str) -> ConfigError:
    """The ConfigError for one of `MegatronRefusal`, which shows the line of an assertion that says nothing."""
    said = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
    return ConfigError(f"Megatron-LM refuses {what}: {said}")
