"""`hbp prepare`: chat JSONL -> token store."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from megatron_hbp.data.formats import FORMATS
from megatron_hbp.data.jsonl import input_bytes
from megatron_hbp.data.prepare import prepare_store, skipped_by_kind
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.report.progress import byte_progress

INPUT_HELP = f"JSONL file with one chat per line; formats: {', '.join(one.name for one in FORMATS)}. Repeatable."


def prepare(
    inputs: Annotated[list[Path], typer.Option("--input", "-i", help=INPUT_HELP)],
    tokenizer: Annotated[str, typer.Option(help="Directory of a Hugging Face tokenizer, or its hub name.")],
    out: Annotated[Path, typer.Option(help="Directory of the token store to write.")],
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja chat template that replaces the tokenizer's own; it encloses the assistant's text in "
            "{% generation %} ... {% endgeneration %}."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Refuse (with --lenient: skip) longer samples; none is truncated."),
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Skip bad chats and count them by kind.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing token store.")] = False,
) -> None:
    """Turn chats into a token store: tokens, and a loss mask that covers the assistant's turns only."""
    total = input_bytes(inputs)
    terminal = Console(stderr=True)
    with terminal.status(f"loading tokenizer {tokenizer}"):
        chat_tokenizer = ChatTokenizer.load(tokenizer, template_file=chat_template)
    with byte_progress("tokenising", total, terminal) as advance:
        store = prepare_store(
            inputs=inputs,
            tokenizer=chat_tokenizer,
            out=out,
            lenient=lenient,
            max_length=max_length,
            overwrite=overwrite,
            on_progress=advance,
        )
    _print_summary(store)


def _print_summary(store: TokenStore) -> None:
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
