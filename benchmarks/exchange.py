"""What attention's exchanges transfer and cost, and gang schedules compared with lockstep.

    python -m benchmarks.exchange [--write benchmarks/exchange.md]

Bytes are counted on 8 gloo ranks that stand for two nodes of four; they are the same on every machine. Times are
medians of one run on a CPU, to be read as ratios. Seconds on clusters are modelled with the constants of the shipped
cost models (planning/cost/presets.py). The corpus of the last table is that of the demo.
"""

import argparse
import heapq
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.exchange_ranks import COUNTED_TOKENS, NODE_SIZE, ROUNDS, TIMED_TOKENS, request_of
from benchmarks.lengths import generate
from megatron_hbp.data.prepare import prepare_store
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.demo.corpus import build_corpus
from megatron_hbp.planning import Plan, Request, Samples, make_plan, parse_tiers
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.exchanges import EXCHANGES, usable
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.cost.exchange import price
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2, LLAMA_8B, LLAMA_70B, preset
from megatron_hbp.planning.request import Schedule
from tests.launching import launch

SHAPES = {
    "Llama-3.1-8B": LLAMA_8B.attention,
    "70B, TP 8": LLAMA_70B.attention.on_tensor_parallel_rank(8),
    "DeepSeek-V2": DEEPSEEK_V2.attention,
}
LATENT_SHARES = {"qkv_latent": {2: 0.26, 4: 0.31, 8: 0.41}, "kv_latent": {2: 1 / 70, 4: 1 / 35, 8: 1 / 17}}
"""Upper limits on the elements of DeepSeek-V2's latents, as shares of those of Ulysses."""
HEAVY = {
    "GQA": AttentionShape(num_query_heads=16, num_kv_heads=4, qk_width=64, v_width=64),
    "MLA": AttentionShape(
        num_query_heads=16, num_kv_heads=16, qk_width=96, v_width=64, q_latent=96, kv_latent=64, rope_width=32
    ),
}
"""Communication-heavy: hidden 64, attention 1,024 to 1,536 wide."""
CLUSTERS = (
    ("8B, 32 GPUs", "llama3.1-8b-h100", 32, 28),
    ("70B TP 8, 256 GPUs", "llama3.1-70b-h100-tp8", 32, 80),
    ("DeepSeek-V2, 256 GPUs", "deepseek-v2-h100", 256, 60),
)
"""Setting, preset, data-parallel ranks, recomputed layers."""
STEP_TOKENS = 16_384
GANG_TIERS = "1024:cp1,4096:cp2,8192:cp4"
GANG_STEPS = 4
SCHEDULES: tuple[Schedule, ...] = ("lockstep", "gang")


def main() -> None:
    """Print the tables; with --write also save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    write = parser.parse_args().write
    console = Console(width=150, record=True)
    console.print("$ python -m benchmarks.exchange --write benchmarks/exchange.md", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for make in (bytes_tables, times_table, modelled_table, gang_table):
            for table in make(Path(folder)):
                console.print(table)
    if write:
        write.write_text(
            f"# Exchanges and schedules in figures\n\n```text\n{console.export_text()}```\n", encoding="utf-8"
        )


def table_of(title: str, caption: str | None, *columns: str, text: int = 1) -> Table:
    """A table whose first `text` columns are text."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text else "right")
    return table


def ask(folder: Path, ranks: int, what: str, shapes: dict[str, AttentionShape], **rest: Any) -> Any:
    """Launch ranks with a request."""
    request = folder / f"{what}.request.json"
    request.write_text(request_of(what, shapes, **rest), encoding="utf-8")
    return launch("benchmarks.exchange_ranks", str(request), ranks=ranks, tmp_path=folder)


# ---------------------------------------------------------------- bytes


def outside_share(cp_degree: int, node_size: int) -> float:
    """Share of what a rank receives from all others that comes from other nodes; gangs are aligned to their degree."""
    in_node = math.gcd(cp_degree, node_size) if cp_degree > node_size else cp_degree
    return (cp_degree - in_node) / max(1, cp_degree - 1)


def across(exchange: str, cp_degree: int) -> tuple[float, float]:
    """Shares of the received elements that come from another node: mean over the ranks, and of the worst rank.

    In a ring all elements come from the neighbour: the first rank of a node receives all of them from another node.
    """
    if not EXCHANGES[exchange].is_ring or cp_degree <= NODE_SIZE:
        share = outside_share(cp_degree, NODE_SIZE)
        return share, share
    return 1 / math.gcd(cp_degree, NODE_SIZE), 1.0


def bytes_tables(folder: Path) -> list[Table]:
    """Counts next to the formula, and the latents as shares of Ulysses."""
    rows = ask(folder, 8, "bytes", SHAPES, degrees=[2, 4, 8])
    table = table_of(
        f"Received in the forward of one layer: 8 ranks, {NODE_SIZE} per node, micro-batches of {COUNTED_TOKENS} "
        f"tokens per rank, one sample per pack, fp32",
        "Each pair of columns shows what was counted and what the formula gives. Elements: per local token, on every "
        "rank. KiB: per micro-batch, mean over the ranks; worst: the rank that receives most from other nodes, in a "
        "ring the first of a node. The last column is what the backward receives over what the forward receives: rings "
        "also pass gradients on.",
        "shape", "exchange", "CP", "elements", "formula", "KiB in node", "formula", "KiB across", "formula", "worst",
        "formula", "all equal", "backward", text=2,
    )  # fmt: skip
    counts: dict[tuple[str, str, int], float] = {}
    kib = COUNTED_TOKENS * 4 / 1024  # of one element per local token
    for row in rows:
        shape, exchange, cp_degree = row["shape"], row["exchange"], row["cp"]
        formula = EXCHANGES[exchange].elements(SHAPES[shape], cp_degree)
        mean, worst = (share * formula for share in across(exchange, cp_degree))
        total = row["inside"] + row["outside"]
        counts[shape, exchange, cp_degree] = total
        pairs = [
            (total, formula), (row["inside"] * kib, (formula - mean) * kib), (row["outside"] * kib, mean * kib),
            (row["most_outside"] * kib, worst * kib),
        ]  # fmt: skip
        every = [*pairs, (row["least"], formula), (row["most"], formula)]
        table.add_row(
            shape, exchange, str(cp_degree), *(f"{value:,.0f}" for pair in pairs for value in pair),
            "yes" if all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in every) else "NO",
            f"x {row['backward'] / total:.2f}",
        )  # fmt: skip
    return [table, latents_table(counts)]


def latents_table(counts: dict[tuple[str, str, int], float]) -> Table:
    """Shares of the elements of Ulysses on DeepSeek-V2, as counted."""
    table = table_of(
        "DeepSeek-V2: latents as a share of the elements of Ulysses", None,
        "exchange", "CP", "share", "target at most", "met", text=1,
    )  # fmt: skip
    for exchange, targets in LATENT_SHARES.items():
        for cp_degree, target in targets.items():
            key = ("DeepSeek-V2", exchange, cp_degree)
            share = counts[key] / EXCHANGES["a2a"].elements(DEEPSEEK_V2.attention, cp_degree)
            digits = 2 if exchange == "qkv_latent" else 3
            met = round(share, digits) <= round(target, digits)
            as_text = f"{share:.3f}" if exchange == "qkv_latent" else f"1/{1 / share:.1f}"
            table.add_row(
                exchange, str(cp_degree), as_text, f"{target:.2f}" if digits == 2 else f"1/{1 / target:.0f}",
                "yes" if met else "NO",
            )  # fmt: skip
    return table


# ---------------------------------------------------------------- times on this CPU


def times_table(folder: Path) -> list[Table]:
    """Step time of each exchange as a ratio."""
    rows = ask(folder, 4, "times", HEAVY, degrees=[2, 4])
    table = table_of(
        f"Forward and backward of 2 layers on 4 gloo ranks, hidden 64, {TIMED_TOKENS} local tokens, fp32: ratio "
        f"to a2a of the same round, median of {ROUNDS}",
        "Attention as wide as that of a small model, with a hidden width of 64. On one machine messages are copies in "
        "memory, and 4 ranks share its cores: the ratios do not carry over to a cluster.",
        "model", "CP", *EXCHANGES, "a2a, ms",
    )  # fmt: skip
    for name in HEAVY:
        for cp_degree in (2, 4):
            seconds = {
                r["exchange"]: np.array(r["seconds"]) for r in rows if (r["shape"], r["cp"]) == (name, cp_degree)
            }
            ratios = [f"{np.median(seconds[e] / seconds['a2a']):.2f}" if e in seconds else "" for e in EXCHANGES]
            table.add_row(name, str(cp_degree), *ratios, f"{np.median(seconds['a2a']) * 1e3:.0f}")
    return [table]


# ---------------------------------------------------------------- modelled on clusters


def modelled_table(folder: Path) -> list[Table]:
    """Chosen exchange and the slowest usable one, seconds per step."""
    table = table_of(
        "Chosen exchange and the slowest usable one, modelled: lengths like those of Tulu-3 + LongCite, up to 128K, "
        "64K tokens per rank and step",
        "A step takes the sum over its slots of the slowest pack (compute + exposed exchange, forward, backward and "
        "recomputed forward). Rates and links are those of the presets; a ring hides 80% of what fits under attention.",
        "setting", "CP", "chosen", "slowest", "chosen,\nms per layer", "slowest,\nms per layer", "chosen,\ns per step",
        "slowest,\ns per step", "saved s", "saved", "a2a,\ns per step",
    )  # fmt: skip
    for name, model, ranks, layers in CLUSTERS:
        cost = preset(model)
        tiers = f"16384:cp1:full{layers},32768:cp2:full{layers},65536:cp4:full{layers},131072:cp8:full{layers}"
        lengths = np.concatenate([generate("tulu3", num_samples=60_000), generate("longcite", num_samples=3_000)])
        request = Request(
            tiers=parse_tiers(tiers), num_ranks=ranks, step_tokens=4 * ranks * 16384, cost=cost, overlong="drop"
        )
        plan = make_plan(Samples.of(lengths), request)
        best, worst = choices(plan, cost, best=True), choices(plan, cost, best=False)
        ulysses = ["a2a"] * len(plan.tiers)
        chosen, dear, usual = (step_seconds(plan, cost, picked) for picked in (best, worst, ulysses))
        totals = [f"{chosen:.2f}", f"{dear:.2f}", f"{dear - chosen:.2f}", f"{1 - chosen / dear:.1%}", f"{usual:.2f}"]
        for index, tier in enumerate(plan.tiers):
            if tier.cp_degree == 1:
                continue
            one, other = (exposed(plan, cost, index, picked[index]) for picked in (best, worst))
            last = tier is plan.tiers[-1]
            table.add_row(
                name if tier.cp_degree == 2 else "", str(tier.cp_degree), best[index], worst[index],
                f"{one * 1e3:.2f}", f"{other * 1e3:.2f}",
                *(totals if last else ()),
            )  # fmt: skip
    return [table]


def exposed(plan: Plan, cost: CostModel, tier: int, exchange: str) -> float:
    """Exposed seconds of a layer, forward and backward, for a full pack of the tier with the median of its squares."""
    squares = plan.pack_squares[plan.pack_tier == tier]
    return _seconds(
        cost, exchange, plan.tiers[tier].cp_degree, plan.tiers[tier].packing_length, float(np.median(squares))
    )


def _seconds(cost: CostModel, exchange: str, cp_degree: int, tokens: int, squares: float) -> float:
    """Exposed seconds of a layer on one GPU: heads, rates and links of one GPU, nodes counted in ranks."""
    machine = replace(cost.machine, node_size=cost.rank.node_size)
    return price(
        EXCHANGES[exchange], cost.rank_attention, cp_degree=cp_degree, tokens=tokens, squares=squares, machine=machine
    ).seconds


def choices(plan: Plan, cost: CostModel, *, best: bool) -> list[str]:
    """The cheapest (or the most expensive) exchange that each tier can use."""
    picked: list[str] = []
    for index, tier in enumerate(plan.tiers):
        if tier.cp_degree == 1 or not (plan.pack_tier == index).any():
            picked.append("a2a")
            continue
        names = [each.name for each in usable(cost.rank_attention, tier.cp_degree)]
        by_price = sorted((exposed(plan, cost, index, name), name) for name in names)
        picked.append(by_price[0 if best else -1][1])
    return picked


def step_seconds(plan: Plan, cost: CostModel, picked: list[str]) -> float:
    """Mean modelled seconds of a step with these exchanges."""
    compute = cost.without_exchange()
    seconds = compute.pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    for pack in np.flatnonzero(plan.pack_cp > 1):
        tier, exchange = plan.tiers[plan.pack_tier[pack]], picked[plan.pack_tier[pack]]
        share = tier.recompute.share_of_layers(cost.num_layers)
        tokens, squares = int(plan.pack_tokens[pack]), float(plan.pack_squares[pack])
        one = _seconds(cost, exchange, tier.cp_degree, tokens, squares)
        again = share / (1 + EXCHANGES[exchange].backward_bytes)  # the forward's part, recomputed
        seconds[pack] += cost.num_layers * (1 + again) * one
    slots = np.zeros((plan.num_steps, plan.max_micro_batches))
    np.maximum.at(slots, (plan.pack_step, plan.pack_slot), seconds)
    return float(slots.sum() / plan.num_steps)


# ---------------------------------------------------------------- gang against lockstep


def gang_table(folder: Path) -> list[Table]:
    """Busy time per rank and makespan from measured micro-batches of the demo's dense model."""
    corpus = build_corpus(folder)
    tokenizer = ChatTokenizer.load(str(corpus.tokenizer))
    store = prepare_store(inputs=[corpus.train.path], tokenizer=tokenizer, out=folder / "train", overwrite=True)
    samples = Samples.of(store.lengths, store_fingerprint=store.fingerprint)
    request = Request(tiers=parse_tiers(GANG_TIERS), num_ranks=4, step_tokens=STEP_TOKENS)
    plans = {}
    for schedule in SCHEDULES:
        plans[schedule] = make_plan(samples, replace(request, schedule=schedule))
        planfile.save(plans[schedule], folder / f"{schedule}.plan")
    busy = ask(folder, 4, "busy", {}, data=str(folder), plans=list(plans), steps=GANG_STEPS)
    table = table_of(
        f"Gang and lockstep: the demo's dense model and data, 4 ranks, {GANG_TIERS}, {STEP_TOKENS:,} tokens per "
        f"step, first {GANG_STEPS} steps",
        "Busy: CPU seconds of the process in its micro-batches, measured. Makespan follows from them: in lockstep the "
        "sum over slots of the slowest rank; in gang every pack starts when its ranks are free, and ranks synchronise "
        "once per step. Same gradients: tests/equivalence/test_gang.py.",
        "schedule", "tokens", "micro-batches per rank", "busy s by rank", "makespan s", "us per token", "idle", "ratio",
    )  # fmt: skip
    reference = 0.0
    for name, plan in plans.items():
        by_rank = [{(int(step), int(slot)): s for step, slot, s in rank} for rank in busy[name]]
        steps = range(min(GANG_STEPS, plan.num_steps))
        tokens = int(plan.pack_tokens[plan.pack_step < len(steps)].sum())
        makespan = sum(makespan_of(plan, step, by_rank) for step in steps)
        work = [sum(rank.values()) for rank in by_rank]
        each = makespan / tokens * 1e6
        reference = reference or each
        table.add_row(
            name, f"{tokens:,}", ", ".join(str(len(rank)) for rank in by_rank), ", ".join(f"{w:.1f}" for w in work),
            f"{makespan:.1f}", f"{each:.0f}", f"{1 - sum(work) / (len(work) * makespan):.1%}",
            f"{each / reference:.3f}",
        )  # fmt: skip
    return [table]


def makespan_of(plan: Plan, step: int, by_rank: Sequence[dict[tuple[int, int], float]]) -> float:
    """Seconds of a step on ranks that are busy for these seconds in each of its slots."""
    slots = range(int(plan.num_micro_batches[step]))
    if plan.schedule == "lockstep":
        return sum(max(rank.get((step, slot), 0.0) for rank in by_rank) for slot in slots)
    free = [0.0] * len(by_rank)
    todo = [(slot, int(plan.pack_at(step, slot, rank)), rank) for rank in range(len(by_rank)) for slot in slots]
    done: set[int] = set()
    heapq.heapify(todo)  # by slot: no rank comes to a slot before its earlier ones, so this is an order of starts
    while todo:
        slot, pack, rank = heapq.heappop(todo)
        if pack < 0:
            free[rank] += by_rank[rank].get((step, slot), 0.0)  # of a dummy; nothing where there is none
        elif pack not in done:
            done.add(pack)
            first = int(plan.pack_rank0[pack])
            gang = range(first, first + int(plan.pack_cp[pack]))
            end = max(free[r] for r in gang) + max(by_rank[r][step, slot] for r in gang)
            for r in gang:
                free[r] = end
    return max(free)


if __name__ == "__main__":
    main()
