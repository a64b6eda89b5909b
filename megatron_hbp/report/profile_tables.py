"""A profile on the terminal: rows with their fit error, and packs of a plan that the fit never saw."""

from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.fit import ProfileFit, spearman
from megatron_hbp.planning.cost.profile_table import SHAPES, ProfileTable
from megatron_hbp.report.terminal import plain_table, table_console


def fit_table(table: ProfileTable, fit: ProfileFit) -> Table:
    """A line per row: setting, measured, fitted, error in the fit of all rows and in one that did not see the row."""
    headings = ("recompute", "tokens", "CP", "samples", "measured ms", "fitted ms", "error", "held out", "peak MiB")
    lines = plain_table(f"{table.header.device}: {len(table.rows)} rows, dtype {table.header.dtype}", headings)
    errors = {each.row.setting: each for each in fit.errors}
    for row in sorted(table.rows, key=lambda r: (r.tokens, r.cp_degree, r.recompute, r.squares)):
        head = (row.recompute, f"{row.tokens:,}", str(row.cp_degree), str(SHAPES[row.shape]))
        peak = f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes is not None else ""
        if row.setting in errors and row.seconds:
            one = errors[row.setting]
            seconds = (f"{row.seconds * 1e3:,.1f}", f"{one.predicted * 1e3:,.1f}")
            lines.add_row(*head, *seconds, f"{one.error:+.1%}", f"{one.held_out_error:+.1%}", peak)
        else:
            lines.add_row(*head, "", "", "", row.why, peak)
    return lines


def fit_lines(fit: ProfileFit) -> list[str]:
    """The fit's errors in two lines."""
    lines = []
    for what, held_out in ((f"{len(fit.errors)} rows fitted", False), ("held out, a fifth at a time", True)):
        errors = fit.absolute_errors(held_out=held_out)
        lines.append(f"{what}: median error {np.median(errors):.1%}, worst {errors.max():.1%}")
    return lines


def print_fit(table: ProfileTable, fit: ProfileFit, out: Path, cost_file: Path) -> None:
    """All of it, and where the files are."""
    console = table_console()
    console.print(fit_table(table, fit))
    for line in fit_lines(fit):
        console.print(line, highlight=False)
    console.print(f"profile table written to {out}, cost model to {cost_file}", soft_wrap=True, highlight=False)
    ways = f"hbp plan --auto --profile {out} ..., or with tiers of your own, --tiers ... --cost {cost_file}"
    console.print(f"plan with it: {ways}", soft_wrap=True, highlight=False)


def check_table(plan: Plan, predicted: np.ndarray, measured: np.ndarray) -> Table:
    """Predicted against measured seconds [packs], a line per tier."""
    lines = plain_table(
        "Packs of a plan that the fit never saw",
        ("tier", "packs", "measured ms, least to most", "rank correlation", "median error", "worst"),
    )
    for index, tier in enumerate(plan.tiers):
        packs = plan.pack_tier == index
        if not packs.any():
            continue
        error = np.abs(predicted[packs] / measured[packs] - 1)
        low, high = measured[packs].min() * 1e3, measured[packs].max() * 1e3
        lines.add_row(
            str(tier), f"{packs.sum():,}", f"{low:,.0f} to {high:,.0f}",
            f"{spearman(predicted[packs], measured[packs]):.3f}", f"{np.median(error):.1%}", f"{error.max():.1%}",
        )  # fmt: skip
    return lines


def print_check(plan: Plan, predicted: np.ndarray, measured: np.ndarray) -> None:
    """The comparison on the terminal."""
    table_console().print(check_table(plan, predicted, measured))
