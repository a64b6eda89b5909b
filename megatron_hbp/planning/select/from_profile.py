"""From a profile table to what a selection reads: timed settings, and which recompute fits how many local tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.tiers import Recompute
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.cost.profile_memory import layers_by_local_tokens
from megatron_hbp.planning.cost.profile_table import ProfileTable
from megatron_hbp.planning.select.joint import Space
from megatron_hbp.planning.select.paper import TimedSetting, mean_length, memory_table


def profiled(
    table: ProfileTable, cost: CostModel, sample_lengths: np.ndarray, num_ranks: int
) -> tuple[CostModel, Space]:
    """What `table` says of packs of samples like `sample_lengths` int [n] on `num_ranks`: (what fits, what to choose).

    Rows were measured with one sample as long as the pack. `cost`, fitted to the table, carries their seconds over to
    the summed squares of these samples. Raises ConfigError where no CP degree of the table divides the ranks, or none
    of its settings fits.
    """
    if cost.num_layers != table.header.model.num_layers:
        raise ConfigError(
            f"the profile is of a model of {table.header.model.num_layers} layers, cost model {cost.name} of one of "
            f"{cost.num_layers}; leave --cost out, the profile has its own"
        )
    degrees = tuple(sorted(c for c in {row.cp_degree for row in table.rows} if num_ranks % c == 0))
    if not degrees:
        raise ConfigError(
            f"no CP degree of the profile divides {num_ranks} ranks; profile others (hbp profile --cp), "
            "or plan for another number of ranks"
        )
    rows = []
    for row in table.rows:
        if row.shape != "one" or row.cp_degree not in degrees:
            continue
        policy = row.setting.policy
        if not row.fits or row.seconds is None:
            rows.append(TimedSetting(length=row.tokens, cp_degree=row.cp_degree, recompute=policy, fits=False))
            continue
        modelled = cost.tier_cost(row.setting.tier)
        squares = int(row.tokens * mean_length(sample_lengths, row.tokens))
        seconds = row.seconds * modelled.seconds(row.tokens, squares) / modelled.seconds(row.tokens, row.squares)
        rows.append(TimedSetting(length=row.tokens, cp_degree=row.cp_degree, recompute=policy, seconds=float(seconds)))
    memory = layers_by_local_tokens(table) or memory_table(rows)
    if not memory:
        raise ConfigError("no setting of the profile fits into memory; profile shorter lengths or higher CP degrees")
    found = Space(rows=tuple(rows), selective=_selective(rows), degrees=degrees)
    return replace(cost, recompute_layers=memory, recompute_ranks=0), found


def _selective(rows: Sequence[TimedSetting]) -> tuple[tuple[int, Recompute], ...]:
    """The most local tokens that each selective policy was seen to fit, below the least that it was seen not to."""
    found = []
    for policy in dict.fromkeys(row.recompute for row in rows if row.recompute.granularity == "selective"):
        mine = [(row.length // row.cp_degree, row.fits) for row in rows if row.recompute == policy]
        too_many = min((local for local, fits in mine if not fits), default=None)
        fitting = [local for local, fits in mine if fits and (too_many is None or local < too_many)]
        if fitting:
            found.append((max(fitting), policy))
    return tuple(found)
