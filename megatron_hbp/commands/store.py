"""`hbp store`: check token stores."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_hbp.data.store import TokenStore
from megatron_hbp.report.progress import byte_progress

app = typer.Typer(help="Check token stores.", no_args_is_help=True)


@app.command()
def verify(path: Annotated[Path, typer.Argument(metavar="STORE", help="A token store made by `hbp prepare`.")]) -> None:
    """Read every file of a token store and compare its SHA-256 with the manifest's; ends with 65 for a damaged one."""
    opened = TokenStore.open(path)
    with byte_progress("verifying", opened.bulk_bytes, Console(stderr=True)) as advance:
        opened.verify(on_progress=advance)
    print(f"{path}: {opened.num_samples:,} samples, all files as written (fingerprint {opened.fingerprint[:16]})")
