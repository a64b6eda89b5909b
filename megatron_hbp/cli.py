"""The console command `hbp`: one file in `commands/` per sub-command, and one place where errors become exit codes."""

import sys
from typing import Any

import typer

from megatron_hbp.commands import plan, prepare, profile, simulate, store
from megatron_hbp.errors import ConfigError, HbpError

UsageError: Any = typer.BadParameter.__base__
"""Every mistake in arguments. typer carries a click of its own, and exports this subclass alone."""

app = typer.Typer(
    name="hbp",
    help="Long-context supervised fine-tuning with Hierarchical Balance Packing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare")(prepare.prepare)
app.add_typer(store.app, name="store")
app.add_typer(plan.app, name="plan")
app.command("profile", context_settings={"allow_extra_args": True})(profile.profile)
app.command("simulate")(simulate.simulate_plan)


def main() -> None:
    """Run `hbp`; a known error ends in one line on stderr and its exit code, never in a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        message, command = error.format_message(), error.ctx.command_path if error.ctx else "hbp"
        if "\n" in message:  # no arguments, and no rich: the message is the help
            print(message, file=sys.stderr)
        elif message:  # empty where rich has printed the help already
            print(f"hbp: {message.rstrip('.')}; see `{command} --help`", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except HbpError as error:
        print(f"hbp: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)  # interrupted


if __name__ == "__main__":
    main()
