"""The paper's tables beside ours: rates calibrated on tables 4, 18 and 19 alone, everything else predicted.

    python -m benchmarks.paper_tables [--lengths LENGTHS.npy] [--write benchmarks/paper_tables.md]

Paper: arXiv 2503.07680v3. Lengths are generated (benchmarks/lengths.py), the data sets' own are not available. GPU
days need the number of epochs, which the paper does not say: one factor, set by table 6's first row, serves all tables.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from megatron_hbp.planning.simulate.topology import Topology

from benchmarks.calibrate import RATES, Fit, Timing, fit
from benchmarks.lengths import generate
from benchmarks.peers.flexsp import flexsp
from megatron_hbp.planning import Plan, make_plan, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.cost.model import CostModel, preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.measure.quality import side_by_side_abr
from megatron_hbp.planning.packing.methods import METHODS, PackingMethod, isf
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.simulate.simulator import simulate

NAIVE = "131072:cp8:full28"
TWO_TIERS = "16384:cp1:full28,131072:cp8:full28"
MANUAL = "32768:cp2:full28,131072:cp8:full28"
LOCAL = 16384


def timing(table: str, length: int, cp: int, layers: int, seconds: float) -> Timing:
    """A row of the paper: `length` in K, 16K tokens a GPU and iteration whatever the tier (the fit tells so)."""
    text = f"{1024 * length}:cp{cp}" + (f":full{layers}" if layers else "")
    tier = parse_tiers(text)[0]
    # Table 4 times one sample a pack (its times grow with the length); 18 and 19 a mix, whose mean length is fitted.
    sample_tokens = "" if table == "4" else f"samples of table {table}"
    return Timing(
        label=f"table {table}: {length}K SP{cp} GC{layers}", tier=tier, seconds=seconds,
        micro_batches=LOCAL / tier.local_tokens, sample_tokens=sample_tokens or 0.0,
    )  # fmt: skip


TIMINGS = [
    *(
        timing("4", *row)
        for row in (
            (32, 2, 28, 4.45), (32, 4, 23, 4.35), (32, 8, 8, 4.12), (64, 4, 28, 6.3), (64, 8, 24, 6.2),
            (128, 8, 29, 10.2), (128, 16, 23, 10.5),
        )
    ),
    *(timing("18", *row) for row in ((32, 2, 28, 3.01), (32, 4, 23, 2.95), (32, 8, 8, 2.82), (32, 16, 0, 3.60))),
    *(
        timing("19", *row)
        for row in ((8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05))
    ),
]  # fmt: skip
"""Tables 4, 18 and 19: seconds of an iteration of Llama-3.1-8B, at a length, SP degree and recomputed layers."""


def calibrated() -> Fit:
    """The 8B's cost model fitted to TIMINGS."""
    return fit(preset("llama3.1-8b-h100"), TIMINGS)


def wider(cost: CostModel, name: str) -> CostModel:
    """The preset `name` with the calibrated rates: a rank of t GPUs is t times as fast, fixed seconds go by layers."""
    base = preset(name)
    gpus = int(name.rsplit("tp", 1)[1])
    rates = {rate: gpus * getattr(cost, rate) for rate in RATES[:-1]}
    return replace(base, **rates, micro_batch_seconds=cost.micro_batch_seconds * base.num_layers / cost.num_layers)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of the paper and ours."""

    table: str
    quantity: str
    paper: float
    ours: float
    unit: str = ""

    @property
    def error(self) -> float:
        """Ours over the paper's - 1; the difference where the paper's is a share below 1."""
        return self.ours - self.paper if self.is_share else self.ours / self.paper - 1

    @property
    def is_share(self) -> bool:
        """Whether errors are differences."""
        return self.unit == "" and self.paper < 1


def packed(lengths: np.ndarray, tiers: str, *, cost: CostModel, method: PackingMethod = isf, balanced: bool = False,
           ranks: int = 32) -> Plan:  # fmt: skip
    """The paper's pipeline: ISF, GreedyFill, one slot a step; samples beyond the longest tier are left out."""
    return make_plan(Samples.of(lengths), Request(tiers=parse_tiers(tiers), num_ranks=ranks, step_tokens=ranks * LOCAL, packing=method, is_balanced=balanced, cost=cost, overlong="drop"))  # fmt: skip


def epoch(plan: Plan, cost: CostModel, *, ep: int = 1) -> float:
    """Simulated seconds; as in the paper's figures parameters are gathered in each micro-batch's fixed seconds."""
    return simulate(plan, cost, Topology(num_nodes=plan.num_ranks // 8, ep=ep, fully_sharded=True)).epoch_seconds


def days(seconds: float, plan: Plan, gpus_of_rank: int = 1) -> float:
    """GPU days of an epoch."""
    return seconds * plan.num_ranks * gpus_of_rank / 86400


class Study:
    """Plans of the main data set, made once, and the factor from an epoch to the paper's training."""

    def __init__(self, lengths: np.ndarray, cost: CostModel) -> None:
        self.lengths, self.cost = lengths, cost
        self.naive = packed(lengths, NAIVE, cost=cost)
        self.split = packed(lengths, TWO_TIERS, cost=cost)
        self.balanced = packed(lengths, TWO_TIERS, cost=cost, balanced=True)
        self.ours = make_plan(
            Samples.of(lengths),
            Request(tiers=parse_tiers(TWO_TIERS), num_ranks=32, step_tokens=32 * LOCAL, cost=cost, overlong="drop"),
        )
        self.epochs = 5.22 / days(epoch(self.naive, cost), self.naive)

    def gpu_days(self, plan: Plan) -> float:
        """GPU days of the paper's training with `plan`."""
        return self.epochs * days(epoch(plan, self.cost), plan)


def table_2(study: Study) -> Iterator[Row]:
    """Naive packing."""
    for tier, abr, cr in (("4096:cp1", 0.343, 0), ("32768:cp4", 0.456, 1), (NAIVE, 0.506, 1)):
        plan = packed(study.lengths, tier, cost=study.cost)
        name = f"{plan.tiers[0].packing_length // 1024}K SP{plan.tiers[0].cp_degree}"
        yield Row(table="2", quantity=f"ABR, {name}", paper=abr, ours=side_by_side_abr(plan, 4, sort=False))
        yield Row(table="2", quantity=f"CR, {name}", paper=cr, ours=plan_metrics(plan, study.cost).cr)


def table_6(study: Study) -> Iterator[Row]:
    """Hierarchical packing and balance, 8B; speed-ups of larger models."""
    plans = (study.naive, study.split, study.balanced)
    steps = ("none", "hierarchical", "+ balance")
    for name, plan, abr, cr, gpu_days in zip(
        steps, plans, (0.506, 0.288, 0.002), (1, 0.173, 0.173), (5.22, 4.51, 3.73), strict=True
    ):
        sort = name == "+ balance"
        yield Row(table="6", quantity=f"8B {name}: ABR", paper=abr, ours=side_by_side_abr(plan, 4, sort=sort))
        yield Row(table="6", quantity=f"8B {name}: CR", paper=cr, ours=plan_metrics(plan, study.cost).cr)
        days_ = study.gpu_days(plan)
        mark = " (sets the number of epochs)" if name == "none" else ""
        yield Row(table="6", quantity=f"8B {name}: GPU days{mark}", paper=gpu_days, ours=days_, unit="days")
    naive, split, balanced = (epoch(plan, study.cost) for plan in plans)
    # The paper rounds 5.22 / 4.51 = 1.16 to 1.2.
    yield Row(table="6", quantity="8B hierarchical: speed-up", paper=5.22 / 4.51, ours=naive / split, unit="x")
    yield Row(table="6", quantity="8B + balance: speed-up", paper=5.22 / 3.73, ours=naive / balanced, unit="x")
    large = (
        ("llama3.1-70b-h100-tp8", "70B", 70, "a2a", 44.4 / 31.1),
        ("qwen2.5-32b-h100-tp4", "Qwen2.5-32B", 56, "all_gather", 1.33),  # CP 8 does not divide 10 heads of a rank
    )
    for name, label, layers, exchange, speed_up in large:
        cost = wider(study.cost, name)
        one, two = (
            text.replace("full28", f"full{layers}").replace("cp8", f"cp8:exchange={exchange}")
            for text in (NAIVE, TWO_TIERS)
        )
        gpus = int(name.rsplit("tp", 1)[1])
        topology = Topology(num_nodes=4 * gpus, tp=gpus, fully_sharded=True)
        before = simulate(packed(study.lengths, one, cost=cost), cost, topology)
        after = simulate(packed(study.lengths, two, cost=cost, balanced=True), cost, topology)
        ours = before.epoch_seconds / after.epoch_seconds
        yield Row(table="6", quantity=f"{label}: speed-up", paper=speed_up, ours=ours, unit="x")
        if label == "70B":
            yield Row(
                table="6", quantity="70B none: GPU days", paper=44.4, ours=study.epochs * before.gpu_days, unit="days"
            )


def table_11(study: Study) -> Iterator[Row]:
    """Which tiers."""
    manual = packed(study.lengths, MANUAL, cost=study.cost, balanced=True)
    for name, plan, paper in (
        ("[32K SP2, 128K SP8] by hand", manual, 4.25),
        ("[16K SP1, 128K SP8] selected", study.balanced, 3.73),
    ):
        yield Row(table="11", quantity=f"{name}: GPU days", paper=paper, ours=study.gpu_days(plan), unit="days")


def table_12(study: Study) -> Iterator[Row]:
    """FlexSP on six steps of 524,288 tokens, against as many tokens of the whole."""
    part = np.random.default_rng(5).permutation(study.lengths)[:3500]
    plan = flexsp(part, num_ranks=32, step_tokens=32 * LOCAL, cost=study.cost, time_limit=3.0)
    found = plan_metrics(plan, study.cost)
    for name, paper in (("pr", 0.04), ("dbr", 0.064), ("cr", 0.171), ("abr", 0.36)):
        yield Row(table="12", quantity=f"FlexSP: {name.upper()}", paper=paper, ours=getattr(found, name))
    scale = study.lengths.sum() / part.sum()
    ours = study.epochs * days(scale * epoch(plan, study.cost), plan)
    yield Row(table="12", quantity="FlexSP: GPU days, its solver left out", paper=4.35, ours=ours, unit="days")


def table_13(study: Study) -> Iterator[Row]:
    """Packing methods in one tier of 128K: DBR, ABR, PR, GPU days."""
    alone: PackingMethod = lambda lengths, capacity, rng: np.arange(len(lengths))  # noqa: E731
    rows = {
        "none": (0.63, 0.72, 0.0, 38.3), "random": (0, 0.53, 0.03, 5.57), "ISF": (0, 0.506, 0.01, 5.22),
        "FFS": (0, 0.508, 0.01, 5.24), "FFD": (0, 0.515, 0.01, 5.48), "BFS": (0, 0.508, 0.01, 5.24),
        "SPFHP": (0, 0.512, 0.01, 5.40),
    }  # fmt: skip
    methods = {name.upper(): method for name, method in METHODS.items()} | {"NONE": alone}
    for name, (dbr, abr, pr, gpu_days) in rows.items():
        if name.upper() not in methods:
            continue
        plan = packed(study.lengths, NAIVE, cost=study.cost, method=methods[name.upper()])
        found = plan_metrics(plan, study.cost)
        yield Row(table="13", quantity=f"{name}: DBR", paper=dbr, ours=found.dbr)
        yield Row(table="13", quantity=f"{name}: ABR", paper=abr, ours=side_by_side_abr(plan, 4, sort=False))
        if name != "none":  # the paper pads nothing there; we count against 128K
            yield Row(table="13", quantity=f"{name}: PR", paper=pr, ours=found.pr)
        yield Row(table="13", quantity=f"{name}: GPU days", paper=gpu_days, ours=study.gpu_days(plan), unit="days")


def mixed(*parts: tuple[str, int]) -> np.ndarray:
    """Data sets put together: (name, samples) each."""
    lengths = np.concatenate([generate(name, num_samples=count, seed=1) for name, count in parts])
    return np.random.default_rng(1).permutation(lengths)


def table_17(study: Study) -> Iterator[Row]:
    """ABR of the paper's method on other data, sorted packs."""
    sets = {
        "Tulu3": (0.001, [("tulu3", 939_343)]),
        "OpenHermes": (0.001, [("openhermes", 1_000_000)]),
        "OpenHermes + LongCite": (0.004, [("openhermes", 1_000_000), ("longcite", 2000)]),
        "Tulu3 + LongWriter": (0.003, [("tulu3", 939_343), ("longwriter", 2000)]),
    }
    ours = side_by_side_abr(study.balanced, 4, sort=True)
    yield Row(table="17", quantity="ABR, Tulu3 + LongCite", paper=0.002, ours=ours)
    for name, (paper, parts) in sets.items():
        plan = packed(mixed(*parts), TWO_TIERS, cost=study.cost, balanced=True)
        yield Row(table="17", quantity=f"ABR, {name}", paper=paper, ours=side_by_side_abr(plan, 4, sort=True))


def table_22(study: Study) -> Iterator[Row]:
    """OpenHermes + LongCite, as table 6."""
    lengths = mixed(("openhermes", 1_000_000), ("longcite", 2000))
    for name, tiers, balanced, abr, gpu_days in (
        ("none", NAIVE, False, 0.513, 2.95),
        ("hierarchical", TWO_TIERS, False, 0.269, 2.33),
        ("+ balance", TWO_TIERS, True, 0.004, 2.04),
    ):
        plan = packed(lengths, tiers, cost=study.cost, balanced=balanced)
        yield Row(table="22", quantity=f"{name}: ABR", paper=abr, ours=side_by_side_abr(plan, 4, sort=balanced))
        yield Row(table="22", quantity=f"{name}: GPU days", paper=gpu_days, ours=study.gpu_days(plan), unit="days")


TABLES: tuple[Callable[[Study], Iterator[Row]], ...] = (
    table_2, table_6, table_11, table_12, table_13, table_17, table_22,
)  # fmt: skip


def deepseek_range(lengths: np.ndarray) -> Iterator[tuple[str, float]]:
    """DeepSeek-V2 on 256 GPUs, 32K: naive over HBP for links and GEMM rates that the paper's tables do not tell."""
    base = preset("deepseek-v2-h100")
    for cp in (4, 8):
        for link in (25e9, 45e9, 90e9):
            # The expert all-to-all inside the GEMM rate, as the preset has it, or apart, over the same link.
            for ep, gemms in ((1, "GEMMs and experts' all-to-all 207 TFLOP/s"), (8, "GEMMs 385 TFLOP/s, EP 8 apart")):
                cost = replace(base, node_bandwidth=link, cluster_bandwidth=link)
                local = 32768 // cp
                naive = packed(lengths, f"32768:cp{cp}", cost=cost, ranks=256)
                hbp = packed(lengths, f"{local}:cp1,32768:cp{cp}", cost=cost, balanced=True, ranks=256)
                yield f"32K SP{cp}, {link / 1e9:.0f} GB/s, {gemms}", epoch(naive, cost, ep=ep) / epoch(hbp, cost, ep=ep)


def main() -> None:
    """Print the tables, and write them as Markdown where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a .npy file; without it lengths are generated")
    parser.add_argument("--write", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    lengths = np.load(options.lengths).astype(np.int64) if options.lengths else generate("mix")
    found = calibrated()
    study = Study(lengths, found.cost)
    rows = []
    for table in TABLES:
        for row in table(study):
            rows.append(row)
            print(f"{row.table:>3} {row.quantity:<48} {row.paper:9.3f} {row.ours:9.3f}", flush=True)
    deepseek = list(deepseek_range(lengths))
    text = markdown(found, study, rows, deepseek)
    print(text)
    if options.write:
        options.write.write_text(text)


def markdown(found: Fit, study: Study, rows: list[Row], deepseek: list[tuple[str, float]]) -> str:
    """Everything as Markdown."""
    lines = ["# The paper's tables, and ours", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [f"{len(study.lengths):,} samples, {study.lengths.sum():,} tokens; {study.epochs:.2f} epochs.", ""]
    lines += ["## Calibrated on: tables 4, 18, 19", "", "| constant | fitted | standard error |", "|---|---|---|"]
    values = {name: getattr(found.cost, name) for name in RATES} | found.lengths
    lines += [f"| {name} | {value:.4g} | {found.spread[name]:.0%} |" for name, value in values.items()]
    lines += ["", "| row | paper, s | ours, s | error |", "|---|---|---|---|"]
    lines += [
        f"| {row.label} | {row.seconds:.2f} | {ours:.2f} | {error:+.1%} |"
        for row, ours, error in zip(TIMINGS, found.predicted, found.errors, strict=True)
    ]
    mean, worst = np.abs(found.errors).mean(), np.abs(found.errors).max()
    lines += ["", f"{len(found.spread)} constants, {len(TIMINGS)} rows: mean error {mean:.1%}, worst {worst:.1%}.", ""]
    lines += ["## Predicted", "", "| table | quantity | paper | ours | error |", "|---|---|---|---|---|"]
    for row in rows:
        error = f"{row.error:+.3f}" if row.is_share or not row.paper else f"{row.error:+.1%}"
        lines.append(f"| {row.table} | {row.quantity} | {row.paper:.3g} | {row.ours:.3g} | {error} |")
    ratios = [ratio for _, ratio in deepseek]
    lines += ["", "## DeepSeek-V2 on 256 GPUs, 32K: the paper's 2.4x", ""]
    lines += [f"Ours: {min(ratios):.2f}x to {max(ratios):.2f}x.", "", "| setting | speed-up |", "|---|---|"]
    lines += [f"| {name} | {ratio:.2f}x |" for name, ratio in deepseek]
    return "\n".join(lines) + "\n\n" + WORD


WORD = """## Where they part

* **What is ours to choose.** Tables 18 and 19 do not say which samples they time: their mean lengths are fitted, two of
  the seven constants, and table 19's good fit leans on that. An iteration is read as 16K tokens a GPU. Table 18's first
  row is read as SP2.
* **GPU days** have one free factor, the number of epochs. Table 6's and 13's first rows are therefore no test; the
  speed-ups, and every other row, are.
* **CR** stays below the paper's .173: fewer tokens of our generated lengths lie in samples over 16K.
* **Table 12** is not reproduced. Our FlexSP has HiGHS for 3 s a program, on about five steps: what it finds in that
  time depends on the machine (3.9 GPU days on quiet cores, 4.3 and 6.1 on busy ones); the paper's solver had 5 to 15 s.
  PR counts against packing lengths and CR every token of a gang, so both lie far from the paper's.
* **Table 13, no packing.** We price GEMMs, attention and a fixed time alone; a million micro-batches of a few hundred
  tokens cost more than that (host, loader, launches), and the paper's iterations seem to be wider (its DBR is .63).
  FFD and SPFHP: sorting puts our long samples together, ABR is above the paper's, the days follow.
* **Table 22.** Our OpenHermes is a lognormal of the published mean, a million samples, with 2,000 of LongCite's
  histogram. GPU days are about a fifth too high in all three rows, so it is the tokens that differ: the speed-ups,
  which do not depend on them, agree to 4%.
* **Larger models.** 70B and 32B are the 8B's rates times the GPUs of a tensor-parallel rank, whose collectives and
  links we do not know. At TP 4 a rank has 10 of the 32B's query heads, which CP 8 does not divide: keys and values are
  gathered there. The paper does not say how it laid this model out.
* **DeepSeek-V2.** The paper gives neither links, nor layout, nor the SP degree of its 32K tier, and tables 4, 18 and 19
  determine none of them: hence a range. It contains 2.4x, and a wide range is a weak test.
"""


if __name__ == "__main__":
    main()
