"""What attention's exchanges move and cost, and gang schedules against lockstep.

    python -m benchmarks.exchange [--write benchmarks/exchange.md]

Bytes are counted by the program on 8 gloo ranks that stand for two nodes of four; they are the same on every machine.
Times are medians of one run on this CPU, to be read as ratios. Seconds of real clusters are modelled: the constants are
those of planning/cost.py. The corpus of the last table is the demo's.
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
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.exchanges import (
    EXCHANGES,
    AttentionShape,
    Exchange,
    backward_bytes,
    elements,
    outside_share,
    price,
    refusal,
)
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import DEEPSEEK_V2, CostModel, preset
from megatron_hbp.planning.request import Request
from tests.launching import launch

LLAMA_8B = AttentionShape(num_query_heads=32, num_kv_heads=8, qk_width=128, v_width=128)
LLAMA_70B = AttentionShape(num_query_heads=64, num_kv_heads=8, qk_width=128, v_width=128)
SHAPES = {
    "Llama-3.1-8B": LLAMA_8B,
    "70B, TP 8": LLAMA_70B.on_tensor_parallel_rank(8),
    "DeepSeek-V2": DEEPSEEK_V2,
}
RINGS = ("p2p", "kv_latent")
LATENT_SHARES = {"qkv_latent": {2: 0.26, 4: 0.31, 8: 0.41}, "kv_latent": {2: 1 / 70, 4: 1 / 35, 8: 1 / 17}}
"""Most elements of DeepSeek-V2's latents, as shares of Ulysses'."""
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


def main() -> None:
    """Print the tables; with --write also as a file."""
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


def across(exchange: Exchange, cp_degree: int) -> tuple[float, float]:
    """Shares of the received elements that come from another node: mean over the ranks, and of the worst rank.

    A ring brings everything from the neighbour: the first rank of a node gets all from the node before, others nothing.
    """
    if exchange not in RINGS or cp_degree <= NODE_SIZE:
        share = outside_share(cp_degree, NODE_SIZE)
        return share, share
    return 1 / math.gcd(cp_degree, NODE_SIZE), 1.0


def bytes_tables(folder: Path) -> list[Table]:
    """Counted against the formula, and the latents' shares of Ulysses."""
    rows = ask(folder, 8, "bytes", SHAPES, degrees=[2, 4, 8])
    table = table_of(
        f"Received in the forward of one layer: 8 ranks, {NODE_SIZE} a node, micro-batches of {COUNTED_TOKENS} "
        f"tokens a rank, one sample a pack, fp32",
        "A pair of columns is what was counted and what the formula says. Elements: per local token, on every rank. "
        "KiB: per micro-batch, mean over the ranks; worst: the rank that gets most from other nodes, in a ring the "
        "first of a node. The last column is what the backward receives over that of the forward: rings pass gradients "
        "on too.",
        "shape", "exchange", "CP", "elements", "formula", "KiB in node", "formula", "KiB across", "formula", "worst",
        "formula", "all equal", "backward", text=2,
    )  # fmt: skip
    counts: dict[tuple[str, str, int], float] = {}
    kib = COUNTED_TOKENS * 4 / 1024  # of one element a local token
    for row in rows:
        shape, exchange, cp_degree = row["shape"], row["exchange"], row["cp"]
        wanted = elements(exchange, SHAPES[shape], cp_degree)
        mean, worst = (share * wanted for share in across(exchange, cp_degree))
        total = row["inside"] + row["outside"]
        counts[shape, exchange, cp_degree] = total
        pairs = [
            (total, wanted), (row["inside"] * kib, (wanted - mean) * kib), (row["outside"] * kib, mean * kib),
            (row["most_outside"] * kib, worst * kib),
        ]  # fmt: skip
        every = [*pairs, (row["least"], wanted), (row["most"], wanted)]
        table.add_row(
            shape, exchange, str(cp_degree), *(f"{value:,.0f}" for pair in pairs for value in pair),
            "yes" if all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in every) else "NO",
            f"x {row['backward'] / total:.2f}",
        )  # fmt: skip
    return [table, latents_table(counts)]


def latents_table(counts: dict[tuple[str, str, int], float]) -> Table:
    """Shares of Ulysses' elements on DeepSeek-V2, as counted."""
    table = table_of(
        "DeepSeek-V2: latents as a share of Ulysses' elements", None,
        "exchange", "CP", "share", "target at most", "met", text=1,
    )  # fmt: skip
    for exchange, targets in LATENT_SHARES.items():
        for cp_degree, target in targets.items():
            key = ("DeepSeek-V2", exchange, cp_degree)
            share = counts[key] / elements("a2a", DEEPSEEK_V2, cp_degree)
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
        "Attention as wide as that of a small model over a hidden width of 64. On one machine messages are copies in "
        "memory, and 4 ranks share its cores: no measure of a cluster.",
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
    """Chosen exchange against the worst allowed one, seconds a step."""
    table = table_of(
        "Chosen exchange against the worst allowed one, modelled: lengths like Tulu-3 + LongCite, up to 128K, "
        "64K tokens a rank and step",
        "A step takes the sum over its slots of the slowest pack (compute + exposed exchange, forward, backward and "
        "recomputed forward). Rates and links of planning/cost.py; a ring hides 80% of what fits under attention.",
        "setting", "CP", "chosen", "worst", "ms a layer", "ms a layer ", "s a step", "s a step ", "saved s", "saved",
        "with a2a",
    )  # fmt: skip
    for name, model, ranks, layers in CLUSTERS:
        cost = preset(model)
        tiers = f"16384:cp1:full{layers},32768:cp2:full{layers},65536:cp4:full{layers},131072:cp8:full{layers}"
        lengths = np.concatenate([generate("tulu3", num_samples=60_000), generate("longcite", num_samples=3_000)])
        plan = make_plan(
            Samples.of(lengths),
            Request(
                tiers=parse_tiers(tiers), num_ranks=ranks, step_tokens=4 * ranks * 16384, cost=cost, overlong="drop"
            ),
        )
        best, worst = choices(plan, cost, best=True), choices(plan, cost, best=False)
        ulysses: list[Exchange] = ["a2a"] * len(plan.tiers)
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


def exposed(plan: Plan, cost: CostModel, tier: int, exchange: Exchange) -> float:
    """Exposed seconds of a layer, forward and backward, for a full pack of the tier with the median of its squares."""
    squares = plan.pack_squares[plan.pack_tier == tier]
    return _seconds(
        cost, exchange, plan.tiers[tier].cp_degree, plan.tiers[tier].packing_length, float(np.median(squares))
    )


def _seconds(cost: CostModel, exchange: Exchange, cp_degree: int, tokens: int, squares: float) -> float:
    """Of one device: of a rank that is 8 tensor-parallel ones, rates and bandwidths are an eighth of the model's."""
    assert cost.attention is not None
    shape, tp = cost.attention.on_tensor_parallel_rank(cost.tensor_parallel), cost.tensor_parallel
    machine = replace(
        cost.machine, node_bandwidth=cost.node_bandwidth / tp, cluster_bandwidth=cost.cluster_bandwidth / tp,
        linear_rate=cost.linear_rate / tp, attention_rate=cost.attention_rate / tp,
    )  # fmt: skip
    return price(exchange, shape, cp_degree=cp_degree, tokens=tokens, squares=squares, machine=machine).seconds


def choices(plan: Plan, cost: CostModel, *, best: bool) -> list[Exchange]:
    """The cheapest (or dearest) exchange that each tier is allowed."""
    assert cost.attention is not None
    shape = cost.attention.on_tensor_parallel_rank(cost.tensor_parallel)
    picked: list[Exchange] = []
    for index, tier in enumerate(plan.tiers):
        allowed = [e for e in EXCHANGES if not refusal(e, shape, tier.cp_degree)]
        if tier.cp_degree == 1 or not (plan.pack_tier == index).any():
            picked.append("a2a")
            continue
        by_price = sorted((exposed(plan, cost, index, e), e) for e in allowed)
        picked.append(by_price[0 if best else -1][1])
    return picked


def step_seconds(plan: Plan, cost: CostModel, picked: list[Exchange]) -> float:
    """Mean modelled seconds of a step with these exchanges."""
    alone = replace(cost, attention=None).pack_seconds(plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares)
    seconds = np.array(alone)
    for pack in np.flatnonzero(plan.pack_cp > 1):
        tier = plan.tiers[plan.pack_tier[pack]]
        share = min(1.0, tier.recompute.num_layers / cost.num_layers)
        one = _seconds(
            cost,
            picked[plan.pack_tier[pack]],
            tier.cp_degree,
            int(plan.pack_tokens[pack]),
            float(plan.pack_squares[pack]),
        )
        again = share / (1 + backward_bytes(picked[plan.pack_tier[pack]]))  # the forward's part, recomputed
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
    plans = {}
    for schedule in ("lockstep", "gang"):
        plans[schedule] = make_plan(Samples.of(store.lengths, store_fingerprint=store.fingerprint), Request(tiers=parse_tiers(GANG_TIERS), num_ranks=4, step_tokens=STEP_TOKENS, schedule=schedule))  # fmt: skip
        planfile.save(plans[schedule], folder / f"{schedule}.plan")
    busy = ask(folder, 4, "busy", {}, data=str(folder), plans=list(plans), steps=GANG_STEPS)
    table = table_of(
        f"Gang against lockstep: the demo's dense model and data, 4 ranks, {GANG_TIERS}, {STEP_TOKENS:,} tokens a "
        f"step, first {GANG_STEPS} steps",
        "Busy: CPU seconds of the process in its micro-batches, measured. Makespan follows from them: in lockstep the "
        "sum over slots of the slowest rank, in gang every pack starts when its ranks are free and ranks meet once a "
        "step. Same gradients: tests/equivalence/test_gang.py.",
        "schedule", "tokens", "micro-batches a rank", "busy s by rank", "makespan s", "us a token", "idle", "ratio",
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
    """Seconds of a step on ranks that work these seconds in each of its slots."""
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
            free[rank] += by_rank[rank].get((step, slot), 0.0)  # a dummy; nothing elsewhere
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
