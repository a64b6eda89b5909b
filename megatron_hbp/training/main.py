"""From a command line to Megatron-LM's `pretrain()`."""

from megatron_hbp.runtime.options import HbpOptions, add_hbp_arguments, planned_flags
from megatron_hbp.runtime.program import leave, parse, run_program
from megatron_hbp.runtime.refusals import PACKED, PLANNED


def main() -> None:
    """Train; a known error ends in one line and its exit code."""
    run_program(run, "pretrain_hbp")


def run(argv: list[str]) -> None:
    """Train with Megatron-LM's flags and ours.

    Raises:
        HbpError: any mistake in flags, plan or store, before a process group exists where that is possible.
    """
    options = HbpOptions.from_argv(argv)
    if options.train is None:
        args = parse(argv, add_hbp_arguments)
        from megatron_hbp.training.plain import train_plain

        train_plain(args)
    else:
        args = parse(argv, add_hbp_arguments, planned_flags(options), "--hbp-plan", PACKED, PLANNED)
        from megatron_hbp.training.planned import train_on_plan

        train_on_plan(args, options)
    leave()
