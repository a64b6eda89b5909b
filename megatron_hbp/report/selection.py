"""What a selection tried, as a table for a terminal."""

from rich.console import Console
from rich.table import Table

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.select.joint import Candidate, Selection
from megatron_hbp.report.terminal import plain_table


def print_selection(console: Console, found: Selection, cost_model: str, *, paper: bool) -> tuple[Tier, ...]:
    """Print what was tried; returns the chosen tiers, or the paper's. Raises ConfigError where it has no choice."""
    theirs = next((one for one in found.tried if one.source == "paper"), None)
    if paper and theirs is None:
        raise ConfigError(f"{found.paper_refused}; or use --hbp-select joint")
    console.print(selection_table(found, cost_model=cost_model))
    if not paper or theirs is None:
        console.print(f"Chosen: {found.reason}.", highlight=False)
        return found.tiers
    saved = 1 - found.chosen.seconds / theirs.seconds
    other = f"joint selection's epoch is {saved:.1%} shorter" if saved > 0 else "joint selection has no shorter epoch"
    console.print(f"Chosen: the paper's tiers, as asked; {other}.", highlight=False)
    return theirs.tiers


def selection_table(selection: Selection, *, cost_model: str) -> Table:
    """One row per tier set, best first; the chosen one is marked. Seconds are the mean over ranks."""
    table = plain_table(
        f"Tiers tried on {selection.num_samples:,} samples; seconds as modelled by {cost_model}, "
        f"lower bound {selection.bound:,.1f} s",
        ("", "tiers", "epoch s", "bound", "recompute s", "exchange s", "equal"),
        left=2,
        text_width=22,
        caption="bound: epoch over the lower bound; equal: as many tokens on a rank in every tier (static shapes)",
    )
    for one in selection.tried:
        table.add_row(*_cells(one, selection))
    return table


def _cells(one: Candidate, selection: Selection) -> tuple[str, ...]:
    marks = ["chosen"] * (one.tiers == selection.tiers) + ["paper"] * (one.source == "paper")
    return (
        " ".join(marks), " ".join(map(str, one.tiers)), f"{one.seconds:,.1f}", f"{one.seconds / selection.bound:.3f}",
        f"{one.recompute_seconds:,.1f}", f"{one.exchange_seconds:,.1f}",
        "yes" if one.has_equal_local_tokens else "no",
    )  # fmt: skip
