"""Auto-selection: the paper's two stages against ours, on six length sets, and on the paper's own table 19.

    python -m benchmarks.selection [--samples N] [--write benchmarks/selection.md]

Llama-3.1-8B on 32 GPUs, 524,288 tokens a step, the shipped preset with 0.02 s and with 0.19 s a micro-batch; lengths
are generated (benchmarks/lengths.py). Samples over 128K are left out. Seconds are modelled, of plans that were made.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from megatron_hbp.planning.select.settings import ProfileRow, iteration_row, select_paper

from benchmarks.lengths import generate
from megatron_hbp.planning import make_plan, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.measure.metrics import plan_metrics
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.select.joint import select_joint

RANKS, LOCAL, LONGEST = 32, 16384, 131072
PUBLISHED = "16384:cp1:full28,131072:cp8:full28"
"""What the paper's selection found for its 8B."""

SETS: dict[str, tuple[tuple[str, int], ...]] = {
    "Tulu3": (("tulu3", 939_343),),
    "Tulu3 + LongCite": (("tulu3", 939_343), ("longcite", 2000)),
    "OpenHermes + LongCite": (("openhermes", 998_000), ("longcite", 2000)),
    "Tulu3 + LongWriter": (("tulu3", 939_343), ("longwriter", 2000)),
    "ChatQA2-long": (("chatqa2", 100_000),),
    "LMSys": (("lmsys", 1_000_000),),
}
"""Name -> (generator, samples) each."""

TABLE_19 = ((8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05))
"""Length in K, SP degree, recomputed layers, seconds of an iteration of 16K tokens a GPU."""

PERMUTED = {
    "table 19": (2.69, 2.65, 2.83, 3.01, 3.05),
    "8K is fastest": (2.65, 2.69, 2.83, 3.01, 3.05),
    "32K is fastest": (2.69, 2.83, 2.65, 3.01, 3.05),
    "64K is fastest": (2.69, 3.01, 2.83, 2.65, 3.05),
}
"""Seconds in the rows' order."""


def lengths_of(name: str, samples: int | None = None) -> np.ndarray:
    """Lengths of a set, shuffled; `samples` of them at most."""
    parts = [generate(part, num_samples=count, seed=1) for part, count in SETS[name]]
    mixed = np.random.default_rng(1).permutation(np.concatenate(parts))
    return mixed[mixed <= LONGEST][:samples]


def table_rows(seconds: Sequence[float]) -> list[ProfileRow]:
    """Table 19's settings with these seconds."""
    return [
        iteration_row(1024 * length, cp, layers, one, rank_tokens=LOCAL)
        for (length, cp, layers, _), one in zip(TABLE_19, seconds, strict=True)
    ]


def text(tiers: Sequence[Tier]) -> str:
    """Tiers as the command line takes them."""
    return "`" + ",".join(map(str, tiers)) + "`"


def compared(samples: int | None) -> Iterator[str]:
    """A Markdown row for each set and fixed cost."""
    for fixed in (0.02, 0.19):
        cost = replace(preset("llama3.1-8b-h100"), micro_batch_seconds=fixed)
        for name in SETS:
            lengths = lengths_of(name, samples)
            start = time.process_time()
            found = select_joint(lengths, cost, num_ranks=RANKS, step_tokens=RANKS * LOCAL, num_planned=4)
            spent = time.process_time() - start
            paper = next(one for one in found.tried if one.source == "paper")
            published = make_plan(
                Samples.of(lengths),
                Request(tiers=parse_tiers(PUBLISHED), num_ranks=RANKS, step_tokens=RANKS * LOCAL, cost=cost),
            )
            equal = min((one.seconds for one in found.tried if one.has_equal_local_tokens), default=np.nan)
            ours, theirs = found.chosen.seconds, plan_metrics(published, cost).epoch_seconds
            yield (
                f"| {fixed} | {name} | {text(paper.tiers)} | {paper.seconds:,.0f} | {text(found.tiers)} | {ours:,.0f} "
                f"| {paper.seconds / ours:.3f} | {theirs / ours:.3f} | {equal / ours:.3f} "
                f"| {paper.seconds / found.bound:.3f} | {ours / found.bound:.3f} | {theirs / found.bound:.3f} "
                f"| {spent:.1f} |"
            )


def main() -> None:
    """Print the tables, and write them as Markdown where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="at most so many samples of each set")
    parser.add_argument("--write", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    asked = f"at most {options.samples:,} samples of each set" if options.samples else "whole sets, of published sizes"
    lines = ["# Selection: the paper's stages and ours", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += ["## `paper`, from table 19 and three permutations of its seconds", "", "| | tiers |", "|---|---|"]
    lines += [f"| {name} | {text(select_paper(table_rows(row), LONGEST))} |" for name, row in PERMUTED.items()]
    lines += ["", "## Six length sets", "", f"{asked.capitalize()}.", ""]
    headings = (
        "s a micro-batch", "lengths", "`paper`", "epoch, s", "`joint`", "epoch, s", "paper / joint",
        "[16K CP1, 128K CP8] / joint", "joint of equal local tokens / joint", "paper over bound", "joint over bound",
        "[16K, 128K] over bound", "selecting, process s",
    )  # fmt: skip
    lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for line in compared(options.samples):
        lines.append(line)
        print(line, flush=True)
        if options.write:
            options.write.write_text("\n".join([*lines, "", WORD]))
    print("\n".join([*lines, "", WORD]))


WORD = """## To read with care

* `paper` runs its stage 1 on the same cost model and memory table, from 8K to the longest, at every power of two of
  ranks; both choices are then planned by our planner, so that only the choice differs.
* `joint` holds the paper's choice among its candidates: it cannot be worse on the data it is chosen for.
* Where lengths grow but degrees fall ("8K is fastest": 16K at CP 1 behind 8K at CP 2), no plan can serve the paper's
  literal set, as samples go to tiers by length: the longer tier takes the shorter one's degree.
* The bound is of powers of two of ranks and the memory table's local tokens; its fixed cost is that of full packs.
* Selective recompute is searched where a profile measured it (`--profile`); these cost models know whole layers alone.
"""


if __name__ == "__main__":
    main()
