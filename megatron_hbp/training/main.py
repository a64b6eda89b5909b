"""Build and run: from a command line to Megatron-LM's `pretrain()`."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from megatron_hbp.errors import HbpError
from megatron_hbp.runtime.arguments import MegatronRefusal, parse, refused_by_megatron
from megatron_hbp.runtime.refusals import PACKED, PLANNED


def main() -> None:
    """Train; a known error ends in one line and its exit code."""
    try:
        run(sys.argv[1:])
    except HbpError as error:
        fail(error, "pretrain_hbp")


def run(argv: list[str]) -> None:
    """Train with Megatron-LM's flags and ours.

    Raises:
        HbpError: any mistake in flags, plan or store, before a process group exists where that is possible.
    """
    from megatron_hbp.training.options import (
        HbpOptions,
        add_hbp_arguments,
        build_for_every_policy,
        check_together,
        describe,
        implied_flags,
        shapes_vary,
        without_fused_mla_rotary,
    )

    options = HbpOptions.from_argv(argv)
    implied, tables = (implied_flags(options), (PACKED, PLANNED)) if options.train is not None else ([], ())
    args = parse(argv, implied=implied, add_arguments=add_hbp_arguments, subject="--hbp-plan", tables=tables)
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    lines = []
    if options.train is not None:
        check_together(args, options)
        build_for_every_policy(args, options)
        lines = without_fused_mla_rotary(args)
    try:
        model = gpt_config_from_args(args)
    except MegatronRefusal as error:
        raise refused_by_megatron(error, "this model") from error
    if options.train is None:
        from megatron_hbp.training import plain

        pretrain(
            pretrain_cfg_container_from_args(args, model),
            plain.datasets_provider,
            ModelType.encoder_or_decoder,
            plain.forward_step,
        )
        leave()
        return

    from megatron_hbp.model.extension import drop_stale_lock
    from megatron_hbp.model.recompute import RecomputeSwitch, install_context_capture
    from megatron_hbp.model.spec import with_packed_model
    from megatron_hbp.training import hooks
    from megatron_hbp.training.feeds import feeds_provider
    from megatron_hbp.training.forward import make_forward_step
    from megatron_hbp.training.metrics import RunMetrics
    from megatron_hbp.training.settle import settle

    # not before the config is made: it would refuse Megatron-LM's default dispatcher, of a dense model too
    args.variable_seq_lengths = model.transformer.variable_seq_lengths = shapes_vary(args, options)
    tiers, exchange_lines = settle(args, model.transformer, options)
    if args.rank == 0:
        print(*(f"> hbp: {line}" for line in (describe(options), *lines, *exchange_lines)), sep="\n", flush=True)
    args.hbp_plan_hash = options.train.plan.hash
    install_context_capture()
    drop_stale_lock(args.recompute_modules or ())
    switch, packed = RecomputeSwitch(), with_packed_model(model)
    plans = [part.plan for part in (options.train, options.valid) if part is not None]
    policies = {f"tier {tier}": tier.recompute for plan in plans for tier in plan.tiers}
    packed.pre_wrap_hooks.append(partial(switch.take, policies=policies))
    metrics = RunMetrics(options.train.plan, options.metrics)
    hooks.install(options, switch, metrics)
    pretrain(
        pretrain_cfg_container_from_args(args, packed),
        feeds_provider(options, tiers),
        ModelType.encoder_or_decoder,
        make_forward_step(metrics.observe),
    )
    from megatron.core import parallel_state

    metrics.summarise(parallel_state.get_data_parallel_group())
    leave()


def leave() -> None:
    """End the process groups together."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


PATIENCE = 20.0
"""Seconds that ranks wait for rank 0 to end the run; importing Megatron-LM takes 5 to 10 where cores are few."""


def fail(error: HbpError, program: str) -> NoReturn:
    """One line on stderr, the exit code where the launcher looks for it, and out.

    Where all ranks come here with the same error, as before the process group exists, rank 0 speaks and leaves, and
    torchrun ends the others 0.1 s later. A rank that is not ended in time speaks itself: rank 0 has no error.
    """
    rank = int(os.environ.get("RANK", "0"))
    together = error.is_everywhere or not torch.distributed.is_initialized()
    if rank and together:
        time.sleep(PATIENCE)
    print(f"{program}: {'' if together and not rank else f'[rank {rank}] '}{error}", file=sys.stderr, flush=True)
    if code_file := os.environ.get("HBP_EXIT_CODE_FILE"):
        Path(code_file).write_text(f"{error.exit_code}\n", encoding="utf-8")
    os._exit(error.exit_code)  # not sys.exit: threads of a process group that others no longer serve would hang it
