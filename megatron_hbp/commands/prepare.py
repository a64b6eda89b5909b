"""`hbp prepare`: chat JSONL -> token store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_hbp.data.store import TokenStore


def prepare(
    inputs: Annotated[
        list[Path], typer.Option("--input", "-i", help="Chat JSONL, an object with `messages` a line. Repeatable.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Directory of a Hugging Face tokenizer, or its hub name.")],
    out: Annotated[Path, typer.Option(help="Token store to write, a directory.")],
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja chat template to use instead of the tokenizer's own; it marks what the assistant says with "
            "{% generation %} ... {% endgeneration %}."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Refuse (with --lenient: skip) longer samples. None is cut.")
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Skip bad chats and count them by kind.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token store that is there.")] = False,
) -> None:
    """Turn chats into a token store: tokens, and a loss mask on the assistant's turns only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_hbp.data.jsonl import input_bytes
    from megatron_hbp.data.prepare import prepare_store
    from megatron_hbp.data.tokenizer import ChatTokenizer

    total = input_bytes(inputs)
    terminal = Console(stderr=True)
    with terminal.status(f"loading tokenizer {tokenizer}"):
        chat_tokenizer = ChatTokenizer.load(tokenizer, template_file=chat_template)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("tokenising", total=total)
        store = prepare_store(
            inputs=inputs,
            tokenizer=chat_tokenizer,
            out=out,
            lenient=lenient,
            max_length=max_length,
            overwrite=overwrite,
            on_progress=lambda bytes_read: progress.advance(task, bytes_read),
        )
    _print_summary(store)


def _print_summary(store: "TokenStore") -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from megatron_hbp.data.prepare import skipped_by_kind

    manifest = store.manifest
    table = Table(title=f"token store {store.path}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("samples", f"{manifest.num_samples:,}")
    table.add_row("tokens", f"{manifest.num_tokens:,}")
    share = manifest.num_loss_tokens / manifest.num_tokens
    table.add_row("loss tokens", f"{manifest.num_loss_tokens:,} ({share:.1%})")
    table.add_row("longest sample", f"{store.lengths.max():,} tokens")
    table.add_row("median sample", f"{np.median(store.lengths):,.0f} tokens")
    table.add_row("fingerprint", store.fingerprint[:16])
    for fault, count in sorted(skipped_by_kind(manifest.sources).items()):
        table.add_row(f"skipped: {fault}", f"{count:,}", style="yellow")
    Console().print(table)
