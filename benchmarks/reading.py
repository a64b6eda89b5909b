"""How fast a rank's micro-batches are made from the store, and how much of that time reading ahead hides.

    python -m benchmarks.reading [--write benchmarks/reading.md]

A store of random tokens with lengths like those of Tulu-3 + LongCite, planned for 32 ranks; this process is one of
them. Times depend on the machine's disk and load. "Cold" starts with the store's files dropped from the page cache
(posix_fadvise), "warm" with them in it.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import generate
from megatron_hbp.data.manifest import BULK_FILES, TokenizerInfo
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.writer import StoreWriter
from megatron_hbp.feed.feed import Feed, MicroBatch
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning import Plan, Request, Samples, make_plan, parse_tiers

TIERS = "16384:cp1,32768:cp2,65536:cp4,131072:cp8"
NODE = range(8)
STEPS = 8
BYTES_PER_TOKEN = 5
"""int32 token, uint8 mask."""
BUSY = (0.05, 0.2)
"""Seconds of a micro-batch on the device (a sleep here); 16K tokens of an 8B model take about 1 s on an H100."""


def main() -> None:
    """Print the tables; with --write also save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    write = parser.parse_args().write
    torch.set_num_threads(1)
    console = Console(width=110, record=True)
    console.print("$ python -m benchmarks.reading --write benchmarks/reading.md", highlight=False)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = random_store(Path(folder) / "store")
        request = Request(tiers=parse_tiers(TIERS), num_ranks=32, step_tokens=2 * 32 * 16384, overlong="drop")
        plan = make_plan(Samples.of(store.lengths), request)
        for table in (making_table(store, plan), waiting_table(store, plan)):
            console.print(table)
    if write:
        write.write_text(f"# Reading in figures\n\n```text\n{console.export_text()}```\n", encoding="utf-8")


def random_store(folder: Path) -> TokenStore:
    """About 60M tokens, 300 MB."""
    lengths = np.concatenate([generate("tulu3", num_samples=30_000), generate("longcite", num_samples=1_200)])
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 128_000, 131_072, np.int32), (rng.random(131_072) < 0.5).astype(np.uint8)
    tokenizer = TokenizerInfo(
        name="none", sha256="0" * 64, chat_template_sha256="0" * 64, vocab_size=128_256, eos_id=None, pad_id=None
    )
    with StoreWriter(folder) as writer:
        for length in rng.permutation(lengths):
            writer.add(tokens[:length], mask[:length])
        writer.finish(tokenizer=tokenizer, sources=[])
    return TokenStore.open(folder)


def feed_of(store: TokenStore, plan: Plan, *, rank: int = 0, read_ahead: int = 0, asks: bool = False) -> Feed:
    """A rank's feed; one that `asks` advises the system what all ranks of the node will read."""
    groups = CpGroups(by_degree=dict.fromkeys((2, 4, 8), None), num_created=0)  # type: ignore[arg-type]
    return Feed(
        plan=plan, store=store, groups=groups, rank=rank, unit=1, full_length=False, device=torch.device("cpu"),
        read_ahead=read_ahead, node_ranks=NODE if asks else (),
    )  # fmt: skip


def drop(store: TokenStore) -> None:
    """Take the store's files out of the page cache."""
    for name in BULK_FILES:
        file = os.open(store.path / name, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def table_of(title: str, caption: str | None, *columns: str) -> Table:
    """A table whose first column is text."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def making_table(store: TokenStore, plan: Plan) -> Table:
    """CPU milliseconds to make a micro-batch, by tier, without reading ahead, files in memory."""
    table = table_of(
        "Making a micro-batch: CPU time of one thread, warm, median",
        None,
        "tier", "micro-batches", "ms", "MB/s of the store", "million local tokens/s",
    )  # fmt: skip
    times: dict[int, list[tuple[float, int, int]]] = {}
    for rank in NODE:
        feed = feed_of(store, plan, rank=rank)
        for _ in range(STEPS * int(plan.num_micro_batches[:STEPS].max())):
            started = time.thread_time()
            batch = next(feed)
            made = (time.thread_time() - started, num_bytes_of(store, batch), batch.tokens.shape[1])
            times.setdefault(batch.tier, []).append(made)
    for tier, found in sorted(times.items()):
        name = str(plan.tiers[tier]) if tier >= 0 else "dummy"
        total = sum(seconds for seconds, _, _ in found)
        table.add_row(
            name, str(len(found)), f"{statistics.median(s for s, _, _ in found) * 1e3:.1f}",
            f"{sum(n for _, n, _ in found) / total / 1e6:,.0f}", f"{sum(n for _, _, n in found) / total / 1e6:.1f}",
        )  # fmt: skip
    return table


def num_bytes_of(store: TokenStore, batch: MicroBatch) -> int:
    """Bytes of the whole pack: a rank reads all of it and keeps its own slice."""
    return int(store.lengths[batch.sample_ids].sum()) * BYTES_PER_TOKEN


def waiting_table(store: TokenStore, plan: Plan) -> Table:
    """Share of the time that a consumer waits, by number of micro-batches read ahead."""
    table = table_of(
        f"Waiting for micro-batches: one rank, the first {STEPS} steps",
        "A micro-batch keeps the device busy for `ms busy` (a sleep); the rest is waiting. Advised: this rank tells "
        "the system what the node's 8 ranks read in this step and the next two, in the order of the file.",
        "page cache", "advised", "ms busy", "ahead", "MB/s read", "waiting", "waiting for the first",
    )  # fmt: skip
    for busy in BUSY:
        for cold, asks, ahead in (
            (True, False, 0), (True, True, 0), (True, False, 2), (True, True, 2), (True, True, 4), (False, False, 0),
            (False, False, 2),
        ):  # fmt: skip
            if cold:
                drop(store)
            feed = feed_of(store, plan, read_ahead=ahead, asks=asks)
            waits, num_bytes, begun = [], 0, time.perf_counter()
            for _ in range(sum(len(feed.slots(step)) for step in range(STEPS))):
                started = time.perf_counter()
                num_bytes += num_bytes_of(store, next(feed))
                waits.append(time.perf_counter() - started)
                time.sleep(busy)
            wall = time.perf_counter() - begun
            feed.close()
            table.add_row(
                "cold" if cold else "warm", "yes" if asks else "no", f"{busy * 1e3:.0f}", str(ahead),
                f"{num_bytes / wall / 1e6:,.1f}", f"{sum(waits) / wall:.1%}", f"{waits[0] / wall:.1%}",
            )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
