"""How a program on many ranks begins and ends: with Megatron-LM's arguments, together, or with one line of an error."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_hbp.errors import ConfigError, HbpError
from megatron_hbp.runtime.options import AddArguments
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
    argv: Sequence[str], add_arguments: AddArguments, implied: Sequence[str] = (), subject: str = "", *tables: Table
) -> Any:
    """Megatron-LM's arguments, validated, from `argv` and the flags that it implies.

    Megatron-LM is imported here for the first time: the platform layer goes before. It reads sys.argv, which is set.

    Args:
        argv: the user's command line; its flags win over implied ones.
        add_arguments: Megatron-LM's `extra_args_provider`.
        implied: Megatron-LM's flags that follow from our own.
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
    message = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
    return ConfigError(f"Megatron-LM refuses {what}: {message}")


PATIENCE = 20.0
"""Seconds that ranks wait for rank 0 to end the run; importing Megatron-LM takes 5 to 10 where cores are few."""


def run_program(run: Callable[[list[str]], Any], program: str) -> None:
    """Run on the command line; a known error ends in one line and its exit code."""
    try:
        run(sys.argv[1:])
    except HbpError as error:
        fail(error, program)


def leave() -> None:
    """End the process groups together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fail(error: HbpError, program: str) -> NoReturn:
    """One line on stderr, the exit code where the launcher looks for it, and out.

    Where all ranks come here with the same error, as before the process group exists, rank 0 speaks and leaves, and
    torchrun ends the others 0.1 s later. A rank that is not ended in time speaks itself: rank 0 has no error.
    """
    rank = int(os.environ.get("RANK", "0"))
    together = error.is_everywhere or not dist.is_initialized()
    if rank and together:
        time.sleep(PATIENCE)
    print(f"{program}: {'' if together and not rank else f'[rank {rank}] '}{error}", file=sys.stderr, flush=True)
    if code_file := os.environ.get("HBP_EXIT_CODE_FILE"):
        Path(code_file).write_text(f"{error.exit_code}\n", encoding="utf-8")
    os._exit(error.exit_code)  # not sys.exit: threads of a process group that others no longer serve would hang it
