"""The planner's figures next to their targets, in one run.

    python -m benchmarks.planning [--lengths LENGTHS.npy] [--write benchmarks/planning.md]

Without --lengths the package's own Tulu-3 + LongCite-like generator makes 941,343 samples. Times are process time on
whatever else the machine does; everything else is the same on every machine. N is the number of ranks unless said.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import generate
from benchmarks.online import plan_batch
from megatron_hbp.planning import Plan, make_plan, parse_tiers
from megatron_hbp.planning.core.plan import DataFingerprint
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import layers
from megatron_hbp.planning.cost.model import ATTENTION_ONLY, CostModel, preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import (
    loss_token_variation,
    lower_bound,
    noisy_step_ratio,
    randomness,
    side_by_side_abr,
)
from megatron_hbp.planning.peers import PEERS
from megatron_hbp.planning.planner import naive_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.schedule.placement import Request

LLAMA, DEEPSEEK = preset("llama3.1-8b-h100"), preset("deepseek-v2-h100")
LOCAL_TOKENS = 16384

DEFAULT = "16384:cp1:full28,32768:cp2:full28,65536:cp4:full28,131072:cp8:full28"
TWO_TIERS = "16384:cp1:full28,131072:cp8:full28"
WIDE = "16384:cp1:full28,32768:cp2:full28,65536:cp8:full23,131072:cp32:full8"
ONLINE = "16384:cp1:full28,32768:cp2:full28,65536:cp4:full28,131072:cp8:full28,262144:cp16:full28,524288:cp32:full28"

Row = tuple[str, str, str, bool | None]
"""(quantity, reached, target, whether it is met)."""


def plan_for(lengths: np.ndarray, tiers: str, *, ranks: int = 32, slots: int = 1, **options) -> Plan:
    """A plan of this package; steps of `slots` full slots."""
    options.setdefault("cost", LLAMA)
    step_tokens = slots * ranks * LOCAL_TOKENS
    return make_plan(
        Samples.of(lengths), Request(tiers=parse_tiers(tiers), num_ranks=ranks, step_tokens=step_tokens, **options)
    )


def over_bound(lengths: np.ndarray, plan: Plan, cost: CostModel = LLAMA) -> float:
    """Modelled epoch over the lower bound; settings allowed to the bound are those of the 8B profile."""
    bound = lower_bound(
        lengths, cost, plan.num_ranks, num_steps=plan.num_steps,
        settings=[(local, layers(count)) for local, count in LLAMA.recompute_layers],
    )  # fmt: skip
    return plan_metrics(plan, cost).epoch_seconds / bound


def at_most(quantity: str, reached: float, target: float, digits: int = 4, unit: str = "") -> Row:
    """A row that wants `reached` <= `target`."""
    return quantity, f"{reached:.{digits}f}{unit}", f"<= {target:g}{unit}", reached <= target


def rows(lengths: np.ndarray) -> Iterator[Row]:
    """All figures of the table, one after the other."""
    yield from paper_rows(lengths)
    default = plan_for(lengths, DEFAULT)
    yield from default_rows(lengths, default)
    yield from exception_rows(lengths)
    yield from scale_rows(lengths)
    yield from speed_rows(lengths)
    yield from peer_rows(lengths)
    yield from loss_rows(lengths, default)
    yield from online_rows(lengths)


def paper_rows(lengths: np.ndarray) -> Iterator[Row]:
    """The paper's own method, to see that data and measures are those of the paper."""
    common = {"tiers": parse_tiers(TWO_TIERS), "num_ranks": 32, "step_tokens": 32 * LOCAL_TOKENS}
    abr = side_by_side_abr(naive_plan(Samples.of(lengths), Request(**common)), 4, sort=False)
    yield "ABR, naive ISF in 128K, N = 4 groups of 128K", f"{abr:.3f}", ".506 +- .03", abs(abr - 0.506) <= 0.03
    unsorted = make_plan(Samples.of(lengths), Request(**common, packing="ISF", is_balanced=False))
    abr, cr = side_by_side_abr(unsorted, 4, sort=False), plan_metrics(unsorted, LLAMA).cr
    yield "ABR, two tiers unsorted, N = 4 groups of 128K", f"{abr:.3f}", ".288 +- .03", abs(abr - 0.288) <= 0.03
    yield "CR, the same", f"{cr:.3f}", ".173 +- .03", abs(cr - 0.173) <= 0.03
    balanced = make_plan(Samples.of(lengths), Request(**common, packing="ISF", is_balanced=True, cost=LLAMA))
    yield "paper's method: epoch over the lower bound", f"{over_bound(lengths, balanced):.4f}", "(for scale)", None
    yield "paper's method: eta^2", f"{randomness(balanced).eta_squared:.4f}", "(for scale)", None


def default_rows(lengths: np.ndarray, plan: Plan) -> Iterator[Row]:
    """One default plan: four tiers of equal local tokens, one slot a step; and eight slots a step."""
    found = plan_metrics(plan, LLAMA)
    dropped = len(lengths) - len(np.unique(plan.sample_ids))
    yield at_most("CR over forced CR, four tiers", found.cr / found.forced_cr, 1.12)
    yield at_most("PR", found.pr, 0.0003, 5)
    yield at_most("DBR, N = 32", found.dbr, 0.0005, 5)
    yield at_most("modelled idle, barrier per micro-batch", 100 * found.idle, 0.09, 4, "%")
    yield at_most("epoch over the lower bound", over_bound(lengths, plan), 1.010)
    yield at_most("eta^2", randomness(plan).eta_squared, 0.005)
    trends = [randomness(plan_for(lengths, DEFAULT, seed=seed)).trend for seed in range(10)]
    yield at_most("Spearman(step, mean log-length), median of ten seeds", float(np.median(trends)), 0.03)
    yield "samples dropped", str(dropped), "0", dropped == 0
    yield at_most("P95 idle under noise over that of equal work", noisy_step_ratio(plan, LLAMA), 1.02)
    many = plan_for(lengths, DEFAULT, slots=8)
    yield at_most("4M tokens a step: modelled idle", 100 * plan_metrics(many, LLAMA).idle, 0.09, 4, "%")
    yield at_most("4M tokens a step: epoch over the lower bound", over_bound(lengths, many), 1.010)
    yield at_most("4M tokens a step: eta^2", randomness(many).eta_squared, 0.005)


def exception_rows(lengths: np.ndarray) -> Iterator[Row]:
    """Other settings than the default, each named."""
    squares = plan_metrics(plan_for(lengths, DEFAULT, cost=ATTENTION_ONLY), LLAMA)
    yield at_most("ABR per GPU, N = 32 (balanced on sum of squares)", squares.abr, 0.0018)
    two = plan_for(lengths, TWO_TIERS)
    found = plan_metrics(two, LLAMA)
    yield at_most("CR over forced CR (two tiers)", found.cr / found.forced_cr, 1.02)
    yield at_most("eta^2, i.i.d. (two tiers)", randomness(two).eta_squared, 0.0001, 5)
    yield at_most("epoch over the lower bound (two tiers)", over_bound(lengths, two), 1.013)
    wide = plan_for(lengths, WIDE)
    yield "epoch over the lower bound (wide tiers)", f"{over_bound(lengths, wide):.4f}", "(for scale)", None
    gang = plan_for(lengths, DEFAULT, slots=8, schedule="gang")
    yield "gang, 4M tokens: idle", f"{100 * plan_metrics(gang, LLAMA).idle:.3f}%", "(for scale)", None
    yield "gang, 4M tokens: epoch over the lower bound", f"{over_bound(lengths, gang):.4f}", "(for scale)", None
    yield "gang, 4M tokens: eta^2", f"{randomness(gang).eta_squared:.5f}", "(for scale)", None


def scale_rows(lengths: np.ndarray) -> Iterator[Row]:
    """Fewer samples and more ranks; the wide tiers use CP 32 for the longest samples, with less recompute."""
    rng = np.random.default_rng(0)
    few = rng.permutation(lengths)[:20000]
    long = lengths[lengths > 2 * LOCAL_TOKENS]
    many_long = np.concatenate([rng.choice(lengths[lengths <= 2 * LOCAL_TOKENS], 20000 - len(long)), long])
    yield at_most("20K random samples on 32", over_bound(few, plan_for(few, DEFAULT)), 1.04)
    yield at_most(
        "20K samples with all the long ones, on 32", over_bound(many_long, plan_for(many_long, DEFAULT)), 1.04
    )
    for ranks, target in ((256, 1.015), (1024, 1.04)):
        for name, tiers in (("default tiers", DEFAULT), ("wide tiers", WIDE)):
            ratio = over_bound(lengths, plan_for(lengths, tiers, ranks=ranks))
            yield at_most(f"all samples on {ranks}, {name}", ratio, target)


def speed_rows(lengths: np.ndarray) -> Iterator[Row]:
    """Planning time against a sort of the lengths."""
    sort = best_seconds(lambda: np.argsort(lengths, kind="stable"))
    plan = best_seconds(lambda: plan_for(lengths, DEFAULT))
    more = np.tile(lengths, 4)
    yield at_most("planning over a stable argsort", plan / sort, 8, 2, "x")
    yield "planning, seconds", f"{plan:.2f}", "(about 0.5)", None
    yield at_most("planning four times the data", best_seconds(lambda: plan_for(more, DEFAULT)) / plan, 4.5, 2, "x")


def best_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Least process time of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def peer_rows(lengths: np.ndarray) -> Iterator[Row]:
    """Tuned static CP and dynamic CP under the same cost model, epoch of theirs over ours."""
    for label, cost, ranks, slots in (
        ("8B on 32", LLAMA, 32, 1),
        ("8B on 32, 4M tokens a step", LLAMA, 32, 8),
        ("DeepSeek-V2 on 256", DEEPSEEK, 256, 1),
        ("DeepSeek-V2 on 256, 8 slots a step", DEEPSEEK, 256, 8),
    ):
        tiers = parse_tiers(DEFAULT)
        request = Request(
            tiers=tiers, num_ranks=ranks, step_tokens=slots * ranks * LOCAL_TOKENS, seed=0, schedule="lockstep",
            cost=cost, data=DataFingerprint.of(lengths),
        )  # fmt: skip
        ours = plan_metrics(plan_for(lengths, DEFAULT, ranks=ranks, slots=slots, cost=cost), cost).epoch_seconds
        times = {
            name: plan_metrics(PEERS[name](lengths, request), cost).epoch_seconds
            for name in ("static CP, tuned", "dynamic CP (Megatron dev)")
        }
        best = min(times, key=times.__getitem__)
        ratio = times[best] / ours
        yield (
            f"faster than the best of static and dynamic CP ({best}), {label}",
            f"{ratio:.2f}x",
            ">= 1.15x",
            ratio >= 1.15,
        )


def loss_rows(lengths: np.ndarray, default: Plan) -> Iterator[Row]:
    """30% of the samples have short answers to long prompts; all other figures must stay what they are without."""
    rng = np.random.default_rng(7)
    share = np.where(
        rng.random(len(lengths)) < 0.3, rng.uniform(0.02, 0.1, len(lengths)), rng.uniform(0.5, 1, len(lengths))
    )
    loss = np.maximum(1, lengths * share).astype(np.int64)
    before = plan_metrics(default, LLAMA).idle
    for label, slots in (("", 1), (", 4M tokens a step", 8)):
        aware = plan_for(lengths, DEFAULT, slots=slots, loss_tokens=loss)
        idle = plan_metrics(aware, LLAMA).idle
        blind = loss_token_variation(plan_for(lengths, DEFAULT, slots=slots), loss)
        yield at_most(f"variation of loss tokens per step{label}", 100 * loss_token_variation(aware, loss), 5, 2, "%")
        yield (
            f"the same, plan blind to them; idle then and now{label}",
            f"{100 * blind:.2f}%; {before:.4%}, {idle:.4%}",
            "same idle",
            idle <= before,
        )
        if slots == 1:
            yield from aware_rows(lengths, aware, loss)


def aware_rows(lengths: np.ndarray, plan: Plan, loss: np.ndarray) -> Iterator[Row]:
    """What else must hold of a plan that looks at loss tokens."""
    found = plan_metrics(plan, LLAMA)
    yield at_most("with loss tokens: modelled idle", 100 * found.idle, 0.09, 4, "%")
    yield at_most("with loss tokens: epoch over the lower bound", over_bound(lengths, plan), 1.010)
    yield at_most("with loss tokens: eta^2", randomness(plan).eta_squared, 0.005)
    yield at_most("with loss tokens: PR", found.pr, 0.0003, 5)
    yield at_most("with loss tokens: DBR, N = 32", found.dbr, 0.0005, 5)
    yield at_most("with loss tokens: CR over forced CR, four tiers", found.cr / found.forced_cr, 1.12)
    plans = [plan_for(lengths, DEFAULT, seed=seed, loss_tokens=loss) for seed in range(10)]
    trend = float(np.median([randomness(one).trend for one in plans]))
    yield at_most("with loss tokens: Spearman(step, mean log-length), median of ten seeds", trend, 0.03)
    worst = 100 * max(loss_token_variation(one, loss) for one in plans)
    yield at_most("variation of loss tokens per step, worst of ten seeds", worst, 5, 2, "%")
    sort = best_seconds(lambda: np.argsort(lengths, kind="stable"))
    seconds = best_seconds(lambda: plan_for(lengths, DEFAULT, loss_tokens=loss))
    yield at_most("with loss tokens: planning over a stable argsort", seconds / sort, 8, 2, "x")


def online_rows(lengths: np.ndarray) -> Iterator[Row]:
    """Batches of 512 samples on 32 ranks, gang schedule, CP degrees up to 32."""
    rng = np.random.default_rng(3)
    tiers = parse_tiers(ONLINE)
    batches = [rng.choice(lengths, 512) for _ in range(50)]
    times, idles = [], []
    for batch in batches:
        start = time.perf_counter()
        plan = plan_batch(batch, tiers=tiers, num_ranks=32, cost=LLAMA)
        times.append(1000 * (time.perf_counter() - start))
        idles.append(100 * plan_metrics(plan, LLAMA).idle)
    yield at_most("online, 512 samples on 32: median time", float(np.median(times)), 10, 2, " ms")
    yield at_most("online, 512 samples on 32: median idle", float(np.median(idles)), 0.5, 3, "%")


def main() -> None:
    """Print the table, and write it as Markdown where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a .npy file; without it lengths are generated")
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    lengths = np.load(options.lengths).astype(np.int64) if options.lengths else generate("mix")
    found = []
    table = Table(title=f"{len(lengths):,} samples, {lengths.sum():,} tokens, 32 ranks, {LLAMA.name}")
    for heading in ("quantity", "reached", "target", "met"):
        table.add_column(heading)
    for row in rows(lengths):
        found.append(row)
        quantity, reached, target, met = row
        table.add_row(quantity, reached, target, {True: "yes", False: "NO", None: ""}[met])
        print(".", end="", flush=True)
    print()
    Console(width=130).print(table)
    if options.write:
        options.write.write_text(markdown(found, lengths, options.lengths))


def markdown(found: list[Row], lengths: np.ndarray, source: Path | None) -> str:
    """The table as Markdown, with the command that makes it."""
    command = "python -m benchmarks.planning --write benchmarks/planning.md" + (" --lengths mix.npy" if source else "")
    lines = [
        "# The planner's figures",
        "",
        f"Made by `{command}`: {len(lengths):,} samples, {lengths.sum():,} tokens.",
        "",
        f"Default tiers: `{DEFAULT}`, 32 ranks, 524,288 tokens (one slot) a step, `{LLAMA.name}`.",
        f"Two tiers: `{TWO_TIERS}`. Wide tiers: `{WIDE}`. N is the number of ranks unless said.",
        "",
        "| quantity | reached | target | met |",
        "|---|---|---|---|",
    ]
    marks = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {quantity} | {reached} | {target} | {marks[met]} |" for quantity, reached, target, met in found]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
