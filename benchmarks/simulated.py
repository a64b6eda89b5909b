"""What each idea contributes, and how we compare with stronger baselines than naive packing: simulated.

    python -m benchmarks.simulated [--lengths LENGTHS.npy] [--write benchmarks/simulated.md]

8B on 32 GPUs (samples up to 128K): rates fitted to the paper's tables 4, 18 and 19 (benchmarks/paper_tables.py).
DeepSeek-V2 on 256 GPUs (32K): the shipped preset with links of 25, 45 and 90 GB/s, which those tables do not determine.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from benchmarks.lengths import generate
from benchmarks.paper_tables import LOCAL, NAIVE, TWO_TIERS, calibrated, packed
from megatron_hbp.planning import Plan, Request, Samples, make_plan, parse_tiers
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.samples import read_samples
from megatron_hbp.planning.core.tiers import Tier, tiers_text
from megatron_hbp.planning.cost.model import CostModel, TierCost
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.peers.default_dynamic import default_dynamic
from megatron_hbp.planning.peers.static_cp import static_cp
from megatron_hbp.planning.select.joint import select_joint
from megatron_hbp.planning.simulate.simulator import Simulation, simulate

FOUR_TIERS = "16384:cp1:full28,32768:cp2:full28,65536:cp4:full28,131072:cp8:full28"


@dataclass(frozen=True, kw_only=True)
class LatentExchange(CostModel):
    """Exchange of q, k and v latents (core/exchanges.py) in tiers where it costs less than heads for sequence."""

    def tier_cost(self, tier: Tier) -> TierCost:
        """Coefficients of `tier`."""
        latent = super().tier_cost(replace(tier, exchange="qkv_latent"))
        return min(super().tier_cost(tier), latent, key=lambda cost: cost.per_token)


def with_latents(cost: CostModel) -> CostModel:
    """`cost` with the latent exchange."""
    return LatentExchange(**{field.name: getattr(cost, field.name) for field in fields(CostModel)})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model on one cluster."""

    name: str
    cost: CostModel
    ranks: int
    naive: str
    two: str
    four: str
    slots: int = 1
    """Micro-batches of 16K tokens per rank and step."""

    def run(self, plan: Plan, cost: CostModel | None = None) -> Simulation:
        """Simulate; parameters are sharded, as the fitted micro-batch seconds include their gathers."""
        topology = Topology(num_nodes=self.ranks // 8, fully_sharded=True)
        return simulate(plan, cost or self.cost, topology)

    def request(self, tiers: tuple[Tier, ...] = (), cost: CostModel | None = None) -> Request:
        """A plan for these ranks and steps; samples beyond the longest tier are left out."""
        step_tokens = self.slots * self.ranks * LOCAL
        return Request(
            tiers=tiers, num_ranks=self.ranks, step_tokens=step_tokens, cost=cost or self.cost, overlong="drop"
        )

    def plan(self, lengths: np.ndarray, tiers: tuple[Tier, ...], cost: CostModel | None = None) -> Plan:
        """Ours: random order, balanced on the whole cost."""
        return make_plan(Samples.of(lengths), self.request(tiers, cost))


def settings() -> Iterator[Setting]:
    """8B, and DeepSeek-V2 with three kinds of links."""
    yield Setting(
        name="8B on 32 GPUs, 128K", cost=calibrated().cost, ranks=32, naive=NAIVE, two=TWO_TIERS, four=FOUR_TIERS
    )
    base = preset("deepseek-v2-h100")
    for degree, link in ((4, 45e9), (4, 25e9), (4, 90e9), (8, 45e9)):
        local = 32768 // degree
        chain = [f"{local * cp}:cp{cp}" for cp in (1, 2, 4, 8) if cp <= degree]
        yield Setting(
            name=f"DeepSeek-V2 on 256 GPUs, 32K, SP {degree}, {link / 1e9:.0f} GB/s", ranks=256,
            cost=base.with_machine(node_bandwidth=link, cluster_bandwidth=link), naive=chain[-1],
            two=f"{chain[0]},{chain[-1]}", four=",".join(chain),
        )  # fmt: skip


def selected_tiers(setting: Setting, lengths: np.ndarray, cost: CostModel) -> tuple[Tier, ...]:
    """Joint selection on a draw of 100,000 samples; without a memory table as many local tokens fit as in naive."""
    naive = parse_tiers(setting.naive)[-1]
    draw = np.random.default_rng(0).permutation(lengths)[:100_000]
    known = replace(cost, recompute_layers=cost.recompute_layers or ((naive.local_tokens, 0),))
    request = replace(setting.request(cost=known), longest=naive.packing_length)
    return select_joint(Samples.of(draw), request, num_planned=4).tiers


Line = tuple[str, Simulation]
"""What was done, and how it went."""


def ablation(setting: Setting, lengths: np.ndarray) -> Iterator[Line]:
    """One idea after the other, starting from naive packing."""
    cost, ranks = setting.cost, setting.ranks
    yield "naive ISF", setting.run(packed(lengths, setting.naive, cost=cost, ranks=ranks))
    yield "+ two tiers (hierarchical)", setting.run(packed(lengths, setting.two, cost=cost, ranks=ranks))
    paper = packed(lengths, setting.two, cost=cost, balanced=True, ranks=ranks)
    yield "+ balance batching: the paper's method, sorted", setting.run(paper)
    yield "random-order balance instead", setting.run(setting.plan(lengths, parse_tiers(setting.two)))
    yield "+ a tier for every CP degree", setting.run(setting.plan(lengths, parse_tiers(setting.four)))
    tiers = selected_tiers(setting, lengths, cost)
    yield f"+ joint selection: {tiers_text(tiers)}", setting.run(setting.plan(lengths, tiers))
    if "deepseek" in cost.name:
        latent = with_latents(cost)
        tiers = selected_tiers(setting, lengths, latent)
        yield "+ latent exchange", setting.run(setting.plan(lengths, tiers, latent), latent)


def baselines(setting: Setting, lengths: np.ndarray) -> Iterator[Line]:
    """Static CP of the best length and degree, and dynamic CP, with the same memory on a rank and the same barriers."""
    tiers = parse_tiers(setting.four)
    samples = Samples.of(lengths[lengths <= tiers[-1].packing_length])
    for limit, degree in (("within a node", 8), ("of any degree", None)):
        plan = static_cp(samples, setting.request(tiers), max_degree=degree)
        yield f"best static CP {limit}: {plan.tiers[0]}", setting.run(plan)
    for slots in (1, 8):
        plan = default_dynamic(samples, replace(setting, slots=slots).request(tiers))
        yield f"dynamic CP, {slots} x 16K tokens per rank and step", setting.run(plan)


def section(setting: Setting, lengths: np.ndarray, report: Callable[[str], None]) -> list[str]:
    """The Markdown of one setting."""
    cost, machine = setting.cost, setting.cost.machine
    lines = [f"## {setting.name}", ""]
    lines += [
        f"Constants: GEMMs {machine.linear_rate / 1e12:.0f} TFLOP/s, attention {machine.attention_rate / 1e12:.0f} "
        f"TFLOP/s, links {machine.node_bandwidth / 1e9:.0f} GB/s within a node and "
        f"{machine.cluster_bandwidth / 1e9:.0f} GB/s between nodes, {cost.micro_batch_seconds:.3f} s per micro-batch.",
        "", "| | epoch, s | over naive | step gain | imbalance | exchange |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    first = last = 0.0
    ours: dict[tuple[int, bool], float] = {}  # (slots per step, with latent exchange) -> seconds
    for name, found in ablation(setting, lengths):
        seconds = found.epoch_seconds
        first, last = first or seconds, last or seconds
        idle = found.idle()
        lines.append(
            f"| {name} | {seconds:,.0f} | {first / seconds:.2f}x | {last / seconds - 1:+.1%} "
            f"| {idle['imbalance']:.1%} | {idle['exchange']:.1%} |"
        )
        report(lines[-1])
        last = ours[1, "latent" in name] = seconds
    many = replace(setting, slots=8)
    for latent in sorted({latent for _, latent in ours}):
        priced = with_latents(cost) if latent else cost
        plan = many.plan(lengths, selected_tiers(setting, lengths, priced), priced)
        ours[8, latent] = many.run(plan, priced).epoch_seconds
    lines.append(f"| the last, 8 x 16K tokens per rank and step | {ours[8, latent]:,.0f} | | | | |")
    for name, found in baselines(setting, lengths):
        idle = found.idle()
        ratio = {latent: found.epoch_seconds / ours[8 if "8 x" in name else 1, latent] for _, latent in ours}
        comparison = f"ours with steps of this size: {ratio[latent]:.2f}x as fast"
        if latent:
            comparison += f", without latent exchange {ratio[False]:.2f}x"
        lines.append(
            f"| *{name}* | {found.epoch_seconds:,.0f} | {first / found.epoch_seconds:.2f}x | {comparison} "
            f"| {idle['imbalance']:.1%} | {idle['exchange']:.1%} |"
        )
        report(lines[-1])
    return [*lines, ""]


def scale() -> list[str]:
    """Ten million samples on 1,024 GPUs: process time of the simulation, without planning."""
    lengths = generate("mix", num_samples=10_000_000)
    lines = ["## 10,000,000 samples on 1,024 GPUs", "", "| plan | simulated in | memory |", "|---|---|---|"]
    for name, tp, pp, v in (("TP 1, PP 1", 1, 1, 1), ("TP 8, PP 8", 8, 8, 1), ("TP 4, PP 8 x 4 chunks", 4, 8, 4)):
        topology = Topology(num_nodes=128, tp=tp, pp=pp, virtual_stages=v)
        ranks = topology.num_ranks
        request = Request(
            tiers=parse_tiers(FOUR_TIERS), num_ranks=ranks, step_tokens=max(4, 2 * pp) * ranks * LOCAL, slot_multiple=pp
        )
        plan = make_plan(Samples.of(lengths), request)
        start = time.process_time()
        simulate(plan, preset("llama3.1-8b-h100"), topology)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        lines.append(f"| {name}: {plan.num_steps:,} steps | {seconds:.1f} s | {peak:.1f} GB |")
    return [*lines, ""]


def main() -> None:
    """Print the tables, and write them as Markdown where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a .npy file; without it lengths are generated")
    parser.add_argument("--write", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    lengths = read_samples(options.lengths).lengths if options.lengths else generate("mix")
    parts = [
        "# Simulated: what each idea contributes, and baselines",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
    ]
    parts += [f"{len(lengths):,} samples, {lengths.sum():,} tokens; samples beyond the longest tier are left out.", ""]
    for setting in settings():
        print(setting.name, flush=True)
        parts += section(setting, lengths, lambda line: print(line, flush=True))
        if options.write:
            options.write.write_text("\n".join(parts))
    parts += [*scale(), NOTES]
    print("\n".join(parts))
    if options.write:
        options.write.write_text("\n".join(parts))


NOTES = """## Notes

* Baselines (megatron_hbp/planning/peers/) have as many tokens on a rank, and recompute by the same memory table (8B).
  Static CP tries every packing length and degree that hold the longest sample, in random order; the table shows the
  fastest. This cost model has no latency per message, which favours its widest degrees. Dynamic CP is
  `default_dynamic_cp` of Megatron-LM's development branch, rule by rule, on random steps. Every slot is a barrier.
* With large steps dynamic CP has so many samples to choose from that only 2 to 9% imbalance is left: no plan could be
  1.15x as fast there; ours is within 1% of perfect balance. With steps of one pack per rank ours is 1.35x to 1.94x as
  fast.
* Sorted order (the paper's) and random order are expected to take the same time: the random order serves training, not
  speed.
* Joint selection is that of `hbp plan --auto` (benchmarks/selection.md), on a draw of 100,000 samples. DeepSeek-V2 has
  no memory table here: as many local tokens fit as in its naive tier, and there is no recompute to trade for them.
* The latent exchange is priced by the elements that it moves; it needs no extra FLOPs.
* The fitted rates are those that the paper's tables show for H100s; the links of DeepSeek-V2's cluster are assumptions.
"""


if __name__ == "__main__":
    main()
