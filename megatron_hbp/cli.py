"""The console command `hbp`: one sub-command a file in `commands/`, and one place where errors become exit codes."""

import sys

import typer

from megatron_hbp.commands import plan, prepare, profile, simulate
from megatron_hbp.errors import HbpError

app = typer.Typer(
    name="hbp",
    help="Long-context supervised fine-tuning with Hierarchical Balance Packing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare")(prepare.prepare)
app.add_typer(plan.app, name="plan")
app.command("profile", context_settings={"allow_extra_args": True})(profile.profile)
app.command("simulate")(simulate.simulate_plan)


def main() -> None:
    """Run `hbp`; a known error ends in one line on stderr and its exit code, never in a traceback."""
    try:
        app()
    except HbpError as error:
        print(f"hbp: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
