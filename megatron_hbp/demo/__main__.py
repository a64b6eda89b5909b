"""`make demo`: real chats and documents, prepared, planned into tiers and trained by Megatron-LM on four CPU ranks."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_hbp.data.prepare import prepare_store
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.demo.corpus import CorpusSummary, SplitSummary, build_corpus
from megatron_hbp.demo.models import MODELS
from megatron_hbp.demo.training import Run, train
from megatron_hbp.errors import HbpError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost.presets import DEFAULT_COST_MODEL, preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.planner import make_plan, naive_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.report.plan_tables import tier_table
from megatron_hbp.report.run_picture import draw_runs
from megatron_hbp.report.terminal import table_console

TIERS = "1024:cp1,8192:cp4:full1"
NUM_RANKS = 4
STEP_TOKENS = 8_192
WIDE_RANKS = 16
"""Ranks for N = 4 packs of 8K at a time, as in the paper; four ranks hold one pack, so there is nothing to balance."""


def main() -> int:
    """Run the demo; returns 0 when both models beat the unigram entropy on held-out text."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="output directory (default out/demo)")
    out = parser.parse_args().out
    started = time.monotonic()
    console = table_console()
    try:
        succeeded = _demo(out, console)
    except HbpError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    console.print(f"\n{time.monotonic() - started:.0f} s in total")
    return 0 if succeeded else 70


def _demo(out: Path, console: Console) -> bool:
    with console.status("collecting text and training a tokenizer"):
        corpus = build_corpus(out)
        tokenizer = ChatTokenizer.load(str(corpus.tokenizer))
    stores = {}
    for name, split in (("train", corpus.train), ("heldout", corpus.heldout)):
        with console.status(f"hbp prepare: {split.path.name}"):
            stores[name] = prepare_store(inputs=[split.path], tokenizer=tokenizer, out=out / name, overwrite=True)
    _print_corpus(corpus, console)

    plans = {name: _plan(store, NUM_RANKS) for name, store in stores.items()}
    for name, plan in plans.items():
        planfile.save(plan, out / f"{name}.plan")
    console.print(tier_table(plans["train"]))
    _print_balance(stores["train"], console)

    entropy = unigram_entropy(stores["train"], corpus.vocab_size)
    runs = []
    for name, flags in MODELS.items():
        data = [f"--hbp-{flag}={out / file}" for flag, file in _FILES.items()]
        runs.append(
            train(name, data + flags, out=out, num_ranks=NUM_RANKS, num_steps=plans["train"].num_steps, console=console)
        )
    _print_runs(runs, entropy, console)
    picture = out / "demo.png"
    held_out = {run.name: run.validation_loss for run in runs}
    draw_runs({run.name: run.steps for run in runs}, held_out, entropy, picture)
    _print_files(out, picture, runs, console)
    return all(run.validation_loss is not None and run.validation_loss < entropy for run in runs)


_FILES = {"plan": "train.plan", "store": "train", "valid-plan": "heldout.plan", "valid-store": "heldout"}


def _plan(store: TokenStore, num_ranks: int) -> Plan:
    samples = Samples.of(store.lengths, store.loss_tokens, store_fingerprint=store.fingerprint)
    return make_plan(samples, _request(num_ranks))


def _request(num_ranks: int) -> Request:
    return Request(
        tiers=parse_tiers(TIERS), num_ranks=num_ranks, step_tokens=STEP_TOKENS * num_ranks // NUM_RANKS
    )  # fmt: skip


def unigram_entropy(store: TokenStore, vocab_size: int) -> float:
    """Entropy of a store's token frequencies in nats: the loss of the best model that ignores the context."""
    counts = np.zeros(vocab_size, np.int64)
    for index in range(store.num_samples):
        counts += np.bincount(store.sample(index)[0], minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _print_corpus(corpus: CorpusSummary, console: Console) -> None:
    table = Table(
        title="Real text from installed packages",
        caption=f"byte-level BPE of {corpus.vocab_size:,} entries, trained on the training split; "
        "the second speaker of a conversation is the assistant",
    )
    table.add_column("")
    for heading in ("conversations (chitchat-dataset)", "documents (CPython's library)", "tokens", "longest"):
        table.add_column(heading, justify="right")

    def row(name: str, split: SplitSummary) -> None:
        table.add_row(
            name, f"{split.num_conversations:,}", f"{split.num_documents:,}, {split.num_documents_cut} cut",
            f"{split.num_tokens:,}", f"{split.longest:,}",
        )  # fmt: skip

    row("training", corpus.train)
    row("held out", corpus.heldout)
    console.print(table)


_MEASURES = ("abr", "cr", "dbr", "pr")


def _print_balance(store: TokenStore, console: Console) -> None:
    """Compare naive packing with HBP, on the ranks of the demo and on as many as the paper's tables assume."""
    table = Table(title="Naive packing (everything in 8,192 at CP 4) and HBP on the training samples")
    table.add_column("")
    for measure in _MEASURES:
        table.add_column(f"{measure.upper()} naive", justify="right")
        table.add_column(f"{measure.upper()} HBP", justify="right")
    cost = preset(DEFAULT_COST_MODEL)
    widths = {
        NUM_RANKS: "4 ranks, as in training: one 8K pack at a time",
        WIDE_RANKS: "16 ranks: N = 4 packs of 8K at a time",
    }
    for num_ranks, label in widths.items():
        naive = plan_metrics(naive_plan(Samples.of(store.lengths), _request(num_ranks)), cost)
        ours = plan_metrics(_plan(store, num_ranks), cost)
        table.add_row(label, *(f"{getattr(m, measure):.3f}" for measure in _MEASURES for m in (naive, ours)))
    console.print(table)


def _print_runs(runs: list[Run], entropy: float, console: Console) -> None:
    table = Table(title="Training in Megatron-LM's loop, where CP group and recompute change between micro-batches")
    table.add_column("model")
    for heading in ("steps", "tokens", "tokens/s", "first loss", "last loss", "held-out loss", "unigram entropy"):
        table.add_column(heading, justify="right")
    for run in runs:
        held_out = run.validation_loss if run.validation_loss is not None else float("nan")
        colour = "green" if held_out < entropy else "red"
        table.add_row(
            run.name, str(len(run.steps)), f"{run.summary['train_tokens']:,}", f"{run.tokens_per_second:,.0f}",
            f"{run.steps[0]['loss']:.3f}", f"{run.steps[-1]['loss']:.3f}", f"[{colour}]{held_out:.3f}[/]",
            f"{entropy:.3f}",
        )  # fmt: skip
    console.print(table)
    tiers = Table(title="Per tier")
    for heading in ("model", "tier", "micro-batches x ranks", "tokens", "ms per micro-batch", "tokens/s per rank"):
        tiers.add_column(heading, justify="left" if heading in ("model", "tier") else "right")
    for run in runs:
        for row in run.summary["tiers"]:
            tiers.add_row(
                run.name, row["tier"], f"{row['micro_batches']:,}", f"{row['tokens']:,}",
                f"{1000 * row['rank_seconds'] / row['micro_batches']:,.0f}",
                f"{row['tokens'] / row['rank_seconds']:,.0f}",
            )  # fmt: skip
    console.print(tiers)


def _print_files(out: Path, picture: Path, runs: list[Run], console: Console) -> None:
    console.print(f"\nfiles in {out}/", highlight=False)
    files = {
        "train.jsonl, heldout.jsonl, tokenizer/": "the chats, and the tokenizer trained on them",
        "train/, heldout/": "token stores (hbp prepare)",
        "train.plan, heldout.plan": "plans (hbp plan show PLAN --format jsonl prints them)",
        **{run.metrics.name: f"one line per step; Megatron-LM's own output is in {run.log.name}" for run in runs},
        picture.name: "picture of the loss curves",
    }
    for name, description in files.items():
        console.print(f"  {name:40} {description}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
