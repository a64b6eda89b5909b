"""`hbp profile`: measure this machine with this model, on the ranks that would train."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_hbp.errors import ConfigError, StopRequested

MODULE = "megatron_hbp.profiling"
MOST_STARTS = 20
"""A start is lost for each row that runs out of memory on one rank while the others wait for it."""


def profile(
    context: typer.Context,
    nproc_per_node: Annotated[str, typer.Option(help="Ranks on this machine, as for torchrun.")] = "1",
    torchrun: Annotated[str, typer.Option(help="Further torchrun flags, in one string (several nodes).")] = "",
    lengths: Annotated[str | None, typer.Option(help="Packing lengths, for example 4096,8192,16384.")] = None,
    cp: Annotated[str | None, typer.Option(help="CP degrees; left out, powers of two to 8.")] = None,
    recompute: Annotated[str | None, typer.Option(help="For example none,full16,full32,sel=core_attn.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB a rank may use; left out, all of its device.")] = None,
    most_local: Annotated[int | None, typer.Option(help="Leave out settings with more tokens on a rank.")] = None,
    check: Annotated[Path | None, typer.Option(help="A plan whose packs are timed too, against the fit.")] = None,
    out: Annotated[Path, typer.Option(help="Profile table; it is resumed where it exists.")] = Path("profile.json"),
) -> None:
    """Measure time and memory of one micro-batch: `hbp profile --nproc-per-node 8 --out P.json -- MODEL FLAGS`.

    After `--` come Megatron-LM's flags, as for pretrain_hbp.py, without the plan. Writes the profile table, for
    `hbp plan --auto --profile`, and beside it a cost model, for `hbp plan --cost`.
    """
    # before torch is imported: its allocator and its profiler speak at every row
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    from megatron_hbp import launch

    given = {
        "lengths": lengths,
        "cp": cp,
        "recompute": recompute,
        "memory": memory,
        "most-local": most_local,
        "check": check,
        "out": out,
    }
    if not (nproc_per_node.isdecimal() and int(nproc_per_node)) and nproc_per_node not in ("gpu", "cpu", "auto"):
        raise ConfigError(f"--nproc-per-node {nproc_per_node}: a number of ranks, or gpu, as for torchrun")
    flags = [f"--hbp-profile-{name}={value}" for name, value in given.items() if value is not None]
    outer = torchrun.split() or ["--standalone"]
    command = [*outer, f"--nproc-per-node={nproc_per_node}", "-m", MODULE, *flags, *context.args]
    code = 0
    for _ in range(MOST_STARTS):
        code = launch.main(command)
        if code != StopRequested.exit_code:
            break
        print("hbp profile: starting the ranks again", file=sys.stderr, flush=True)
    raise typer.Exit(code)
