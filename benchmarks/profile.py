"""`hbp profile` on the demo's two models: seconds, fit errors, packs that the fit never saw, memory against RSS.

    python -m benchmarks.profile [--write benchmarks/profile.md] [--out FOLDER]

Four gloo ranks on this machine. Seconds to profile are wall time and the CPU time of all processes; times of packs are
process CPU time at the speed of the yardstick (profiling/yardstick.py). The plan that is checked has lengths drawn at
random, in the demo's tiers; neither its lengths nor its recompute policy (one layer of two) is in the table. Its slots
are run eleven times in turn. Memory is checked for packs of several samples in fresh processes
(benchmarks/profile_rss.py), with glibc told to give freed blocks back: by default its heap keeps holes, and resident
memory grows by a quarter to two thirds more than tensors hold.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_hbp.demo.__main__ import NUM_RANKS, TIERS
from megatron_hbp.demo.models import MODELS
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.file import cost_model
from megatron_hbp.planning.cost.fit import fit_profile, spearman
from megatron_hbp.planning.cost.profile_memory import peak_of
from megatron_hbp.planning.planner import make_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.report.profile_tables import fit_lines, fit_table

GRID = ["--lengths", "512,1024,8192", "--most-local", "2048", "--cp", "1,4", "--recompute", "none,full2"]
FURTHER = ["--vocab-size", "4096", "--hbp-profile-seconds", "0.3"]
MEMORY = [(1280, 1, "none"), (1536, 1, "full1"), (8192, 4, "none")]
"""Packs whose memory is compared: one whose length and policy are not in the table, one that is."""
TARGET_SECONDS, TARGET_RANK, TARGET_ERROR = 180.0, 0.9, 0.1


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A subprocess: wall seconds and CPU seconds of it and its children."""

    wall: float
    cpu: float


def main() -> None:
    """Run everything; print, and with --write keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--out", type=Path, help="keep tables here, and resume those that are there")
    parser.add_argument("--only", choices=MODELS, help="one model, for example to run them one after the other")
    parser.add_argument("--skip-memory", action="store_true", help="weigh no RSS that is not in --out yet")
    args = parser.parse_args()
    console = Console(width=118, record=True)
    skipped = " --skip-memory" if args.skip_memory else ""
    console.print(f"$ python -m benchmarks.profile --write benchmarks/profile.md{skipped}", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        plan = unseen_plan(out / "unseen.plan")
        total = 0.0
        for name in [args.only] if args.only else MODELS:
            total += one_model(name, [*MODELS[name], *FURTHER], plan, out, console, with_memory=not args.skip_memory)
        told = "met" if total < TARGET_SECONDS else "MISSED"
        console.print(f"both models: {total:.0f} s of wall time (target {TARGET_SECONDS:g}: {told})", highlight=False)
    if args.write:
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        args.write.write_text(
            f"# Profiling in figures\n\n{about}\n\n```text\n{console.export_text()}```\n", encoding="utf-8"
        )


def unseen_plan(path: Path) -> Path:
    """Random lengths in the demo's tiers: many short samples, some long ones, packs of very different squares."""
    rng = np.random.default_rng(7)
    short = np.clip(np.exp(rng.normal(5.0, 1.2, 170)), 16, 1024)
    long = np.exp(rng.uniform(np.log(1100), np.log(8192), 22))
    lengths = np.concatenate([short, long]).astype(np.int64)
    plan = make_plan(
        Samples.of(rng.permutation(lengths)), Request(tiers=parse_tiers(TIERS), num_ranks=NUM_RANKS, step_tokens=16384)
    )
    planfile.save(plan, path)
    return path


def one_model(name: str, flags: list[str], plan: Path, out: Path, console: Console, *, with_memory: bool) -> float:
    """Profile, fit, check; returns the wall seconds that the profile took."""
    table_file = out / f"{name}.json"
    base = [sys.executable, "-m", "megatron_hbp.cli", "profile", "--nproc-per-node", str(NUM_RANKS), *GRID]
    base += ["--out", str(table_file)]
    ran_file = out / f"{name}.ran.json"
    if not ran_file.exists():
        ran = run([*base, "--", *flags], out / f"{name}.log")
        ran_file.write_text(json.dumps({"wall": ran.wall, "cpu": ran.cpu, "load": os.getloadavg()[1]}))
    seconds = json.loads(ran_file.read_text())
    table = profile_table.load(table_file)
    cost = cost_model(str(table_file.with_name(f"{name}.cost.json")))
    fit = fit_profile(table, name=cost.name)
    console.print(
        f"\n[bold]{name}[/]: {len(table.rows)} rows in {seconds['wall']:.0f} s of wall time, {seconds['cpu']:.0f} s of "
        f"CPU time ({NUM_RANKS} ranks, their start and imports included); load average then {seconds['load']:.0f} on "
        f"{os.cpu_count()} cores",
        highlight=False,
    )
    console.print(fit_table(table, fit))
    for line in fit_lines(fit):
        console.print(line, highlight=False)
    check_file = out / f"{name}.check.json"
    if not check_file.exists():
        run([*base, "--check", str(plan), "--", *flags], out / f"{name}.check.log")
    console.print(check_table(json.loads(check_file.read_text())["packs"]))
    console.print(memory_table(name, table, flags, out, weigh=with_memory))
    return seconds["wall"]


def check_table(packs: list[dict]) -> Table:
    """A line a tier, and the targets."""
    lines = Table(title="packs of a plan that the fit never saw", title_justify="left")
    for heading in ("tier", "packs", "measured ms", "rank correlation", "median error", "worst", "met"):
        lines.add_column(heading, justify="left" if heading == "tier" else "right")
    for tier in sorted({pack["tier"] for pack in packs}, key=len):
        predicted, measured = (np.array([p[k] for p in packs if p["tier"] == tier]) for k in ("predicted", "measured"))
        error, rank = np.abs(predicted / measured - 1), spearman(predicted, measured)
        met = "yes" if rank >= TARGET_RANK and np.median(error) <= TARGET_ERROR else "NO"
        lines.add_row(
            tier, str(len(measured)), f"{measured.min() * 1e3:,.0f} to {measured.max() * 1e3:,.0f}", f"{rank:.3f}",
            f"{np.median(error):.1%}", f"{error.max():.1%}", met,
        )  # fmt: skip
    return lines


def memory_table(name: str, table: profile_table.ProfileTable, flags: list[str], out: Path, *, weigh: bool) -> Table:
    """Predicted peaks against the growth of RSS in fresh processes."""
    lines = Table(title="peak memory of a micro-batch, fullest rank, MiB", title_justify="left")
    for heading in ("tokens", "CP", "recompute", "predicted", "growth of RSS", "error", "within 10%"):
        lines.add_column(heading, justify="left" if heading == "recompute" else "right")
    for tokens, cp_degree, recompute in MEMORY:
        result = out / f"{name}.{tokens}.cp{cp_degree}.{recompute}.rss.json"
        if not result.exists() and not weigh:
            continue
        if not result.exists():
            ranks = max(2, cp_degree)  # expert parallelism of the second model wants two
            command = [
                sys.executable, "-m", "megatron_hbp.launch", "--standalone", "--nproc-per-node", str(ranks),
                "-m", "benchmarks.profile_rss", f"--hbp-profile-lengths={tokens}", f"--hbp-profile-cp={cp_degree}",
                f"--hbp-profile-recompute={recompute}", *flags,
            ]  # fmt: skip
            run(command, out / f"{name}.rss.log", HBP_RSS=f"{tokens} {cp_degree} {recompute} {result}")
        growth = json.loads(result.read_text())["growth"]
        predicted = peak_of(table, tokens // cp_degree, cp_degree, recompute)
        assert predicted is not None
        error = predicted / growth - 1
        lines.add_row(
            f"{tokens:,}", str(cp_degree), recompute, f"{predicted / 2**20:,.0f}", f"{growth / 2**20:,.0f}",
            f"{error:+.1%}", "yes" if abs(error) <= TARGET_ERROR else "NO",
        )  # fmt: skip
    return lines


def run(command: list[str], log: Path, **environment: str) -> Ran:
    """Run to the end; raises with the log's end where it fails."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    given = {k: v for k, v in os.environ.items() if k != "HBP_EXIT_CODE_FILE"} | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=given | environment).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(wall=time.monotonic() - begun, cpu=cpu)


if __name__ == "__main__":
    main()
