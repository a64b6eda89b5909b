"""What a selection tried, as a table for a terminal."""

from rich.table import Table

from megatron_hbp.planning.select.joint import Selection, Tried


def selection_table(selection: Selection, *, cost_model: str) -> Table:
    """One row a tier set, best first; the chosen one is marked. Seconds are the mean over ranks."""
    table = Table(
        title=f"Tiers tried on {selection.num_samples:,} samples; seconds as modelled by {cost_model}, "
        f"lower bound {selection.bound:,.1f} s"
    )
    headings = ("", "tiers", "epoch, s", "over bound", "micro-batches", "recompute, s", "exchange, s", "idle", "equal")
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in ("", "tiers") else "right",
            overflow="fold" if heading else "ellipsis", min_width=24 if heading == "tiers" else None,  # one tier's
        )  # fmt: skip
    for one in selection.tried:
        table.add_row(*_cells(one, selection))
    table.caption = "equal: as many tokens on a rank in every tier (static shapes for pipelines)"
    return table


def _cells(one: Tried, selection: Selection) -> tuple[str, ...]:
    mark = "chosen" if one.tiers == selection.tiers else ("paper" if one.source == "paper" else "")
    return (
        mark if one.source != "paper" or mark == "paper" else "chosen (paper)", ", ".join(map(str, one.tiers)),
        f"{one.seconds:,.1f}", f"{one.seconds / selection.bound:.3f}", f"{one.num_slots:,}",
        f"{one.recompute_seconds:,.1f}", f"{one.exchange_seconds:,.1f}", f"{one.metrics.idle:.2%}",
        "yes" if one.has_equal_local_tokens else "no",
    )  # fmt: skip
