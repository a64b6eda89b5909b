"""`hbp plan --auto`: choose the tiers, and say what was tried and why it was chosen."""

from enum import StrEnum
from typing import Any

import numpy as np
from rich.console import Console

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.profile_table import ProfileTable
from megatron_hbp.planning.planner import Overlong, Schedule
from megatron_hbp.planning.select.from_profile import profiled
from megatron_hbp.planning.select.joint import select_joint
from megatron_hbp.planning.select.settings import MemoryTable
from megatron_hbp.report.selection import selection_table


class Select(StrEnum):
    """How tiers are selected."""

    joint = "joint"
    paper = "paper"


def parse_memory(text: str) -> MemoryTable:
    """Read `2048:0,4096:8,16384:28`: (local tokens, fewest recomputed layers that fit), sorted. Raises ConfigError."""
    found = []
    for part in text.split(","):
        tokens, colon, count = part.strip().partition(":")
        if not (colon and tokens.isdecimal() and count.isdecimal() and int(tokens)):
            raise ConfigError(
                f"--memory {part.strip()!r} is not LOCAL_TOKENS:LAYERS; write for example 4096:8,16384:28"
            )
        found.append((int(tokens), int(count)))
    return tuple(sorted(found))


def auto_tiers(
    lengths: np.ndarray,
    cost: CostModel,
    *,
    table: ProfileTable | None,
    select: Select,
    memory: MemoryTable | None,
    num_ranks: int,
    step_tokens: int,
    longest: int | None,
    overlong: Overlong,
    equal_local_tokens: bool,
    schedule: Schedule,
    slot_multiple: int,
    seed: int,
    console: Console,
) -> tuple[Tier, ...]:
    """The selected tiers; prints what was tried.

    `cost` is any cost model, shipped or fitted, `table` the profile that it was fitted to, where there is one.
    """
    if longest is not None and longest < 1:
        raise ConfigError(f"--longest must be at least 1 token, got {longest}")
    if longest is not None and overlong == "truncate":
        lengths = np.minimum(lengths, longest)
    too_long = 0 if longest is None else int((lengths > longest).sum())
    if too_long and overlong == "error":
        raise ConfigError(
            f"{too_long} samples are longer than --longest {longest}; add --overlong drop or truncate, "
            "or leave --longest out"
        )
    options: dict[str, Any] = {"memory": memory}
    if table is not None:
        found_there = profiled(table, cost, lengths, num_ranks)
        options = vars(found_there) | ({"memory": memory} if memory else {})
    found = select_joint(
        lengths, cost, num_ranks=num_ranks, step_tokens=step_tokens, longest=longest, schedule=schedule,
        equal_local_tokens=equal_local_tokens, slot_multiple=slot_multiple, seed=seed, **options,
    )  # fmt: skip
    paper = next((one for one in found.tried if one.source == "paper"), None)
    if select is Select.joint:
        console.print(selection_table(found, cost_model=cost.name))
        console.print(f"Chosen: {found.reason}.", highlight=False)
        return found.tiers
    if paper is None:
        raise ConfigError(f"{found.paper_refused}; or use --hbp-select joint")
    console.print(selection_table(found, cost_model=cost.name))
    saved = 1 - found.chosen.seconds / paper.seconds
    other = f"joint selection's epoch is {saved:.1%} shorter" if saved > 0 else "joint selection has no shorter epoch"
    console.print(f"Chosen: the paper's tiers, as asked; {other}.", highlight=False)
    return paper.tiers
