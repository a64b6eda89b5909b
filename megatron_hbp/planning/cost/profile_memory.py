"""Peak memory from a profile table: what fits, how much must be recomputed, what a micro-batch will take.

Algorithms 3 and 4 of the paper (arXiv 2503.07680): two readings, at the fewest and the most recomputed layers, give
bytes per layer; from them follows the least count that fits. Over lengths the bytes grow with the local tokens, on a
line through two readings once more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_hbp.planning.core.tiers import Recompute
from megatron_hbp.planning.cost.profile_table import Measurement, ProfileTable, Setting


class Prediction(NamedTuple):
    """Whether a setting fits, before it is run."""

    peak_bytes: float | None
    """None where no line can be drawn yet."""
    refused: str
    """Why it can't fit; empty where it may."""


def predict_fit(table: ProfileTable, setting: Setting) -> Prediction:
    """Whether `setting` can fit, from the rows measured so far."""
    for row in table.rows:
        if not row.fits and _needs_no_less(setting, row.setting):
            return Prediction(None, f"{row.setting} did not fit")
    limit, peak = table.memory_limit, peak_of(table, setting.local_tokens, setting.cp_degree, setting.recompute)
    if limit is not None and peak is not None and peak > limit:
        return Prediction(peak, f"predicted {peak / 2**30:.2f} GiB, the limit is {limit / 2**30:.2f} GiB")
    return Prediction(peak, "")


def with_limit(table: ProfileTable, limit: float | None) -> ProfileTable:
    """`table` under another memory limit (bytes): measured rows are judged anew, predicted ones left out."""
    if limit == table.memory_limit:
        return table
    rows = []
    for row in table.rows:
        if row.seconds is not None:
            why = over_limit(row.peak_bytes, limit)
            rows.append(replace(row, fits=not why, why=why))
        elif row.why.startswith("out of memory"):  # whatever the limit
            rows.append(row)
    return replace(table, rows=tuple(rows), memory_limit=limit)


def over_limit(peak_bytes: int | None, limit: float | None) -> str:
    """Why a row that ran does not fit; empty where it does."""
    if limit is None or peak_bytes is None or peak_bytes <= limit:
        return ""
    return f"took {peak_bytes / 2**30:.2f} GiB, over the limit"


def peak_of(table: ProfileTable, local_tokens: int, cp_degree: int, recompute: str) -> float | None:
    """Bytes of a micro-batch with so many local tokens, on the line through the two nearest readings.

    Readings are those at the same CP degree and policy, the fullest shape at each length. Numbers of layers that were
    not measured lie on the line between the two that were (Algorithm 3). None with fewer than two readings.

    Logits are taken off before lines are drawn and put on again: where the loss starts to make them in chunks, they
    stop growing.
    """
    header = table.header

    def logits(local: int) -> float:
        return header.logits_bytes * min(header.supervised * local, header.logits_rows)

    def without_logits(policy: str) -> float | None:
        points = _points(table.rows, cp_degree, policy)
        return _on_line({local: peak - logits(local) for local, peak in points.items()}, local_tokens)

    found = without_logits(recompute)
    policy = Recompute.parse(recompute)
    assert policy is not None, recompute
    if found is None and policy.granularity != "selective":
        counts = {
            r.setting.policy.num_layers: r.recompute for r in table.rows if r.setting.policy.granularity != "selective"
        }
        peaks = {n: without_logits(text) for n, text in counts.items()}
        found = _on_line({n: peak for n, peak in peaks.items() if peak is not None}, policy.num_layers)
    return None if found is None else found + logits(local_tokens)


def _on_line(points: Mapping[int, float], at: int) -> float | None:
    """The value at `at` of the line through the two nearest points; a point itself where there is one."""
    if at in points:
        return float(points[at])
    known = np.array(sorted(points))
    if len(known) < 2:
        return None
    right = int(np.clip(np.searchsorted(known, at), 1, len(known) - 1))
    a, b = int(known[right - 1]), int(known[right])
    return float(points[a] + (points[b] - points[a]) / (b - a) * (at - a))


def layers_that_fit(
    rows: Sequence[Measurement], tokens: int, cp_degree: int, limit: float, num_layers: int
) -> int | None:
    """The fewest recomputed layers with which a pack of `tokens` at `cp_degree` fits into `limit` bytes.

    c = c_max - free(c_max) / slope (Algorithm 4), from the two readings furthest apart that there are at this length,
    and more than any count that was seen not to fit; None where even c_max does not fit, or where nothing was read.
    """
    here = _whole_layers(rows, tokens, cp_degree)
    readings = {row.setting.policy.num_layers: float(row.peak_bytes) for row in here if row.peak_bytes is not None}
    refused = [row.setting.policy.num_layers for row in here if row.peak_bytes is None and not row.fits]
    if not readings or readings[max(readings)] > limit:
        return None
    least, most = min(readings), max(readings)
    fewest = least
    if readings[least] > readings[most]:
        slope = (readings[least] - readings[most]) / (most - least)
        fewest = max(most - math.floor((limit - readings[most]) / slope), 0)
    if readings[least] <= limit:
        fewest = min(fewest, least)  # seen to fit
    return min(max([fewest, *(count + 1 for count in refused)]), num_layers)


def _whole_layers(rows: Sequence[Measurement], tokens: int, cp_degree: int) -> list[Measurement]:
    """Rows of one sample at this length and degree that recompute whole layers, or nothing."""
    return [
        row for row in rows
        if (row.tokens, row.cp_degree, row.shape) == (tokens, cp_degree, "one")
        and row.setting.policy.granularity != "selective"
    ]  # fmt: skip


def layers_by_local_tokens(table: ProfileTable) -> tuple[tuple[int, int], ...]:
    """(local tokens, fewest recomputed layers that fit), growing in both: `CostModel.recompute_layers`.

    Of several CP degrees with the same local tokens, the one that needs most counts; where nothing fits at one of them,
    the table ends. Empty without a limit.
    """
    if table.memory_limit is None:
        return ()
    found: dict[int, int] = {}
    too_many = math.inf
    for tokens, c in sorted({(row.tokens, row.cp_degree) for row in table.rows}):
        layers = layers_that_fit(table.rows, tokens, c, table.memory_limit, table.header.model.num_layers)
        if layers is not None:
            found[tokens // c] = max(layers, found.get(tokens // c, 0))
        elif any(not row.fits for row in _whole_layers(table.rows, tokens, c)):
            too_many = min(too_many, tokens // c)
    pairs, most = [], 0
    for local in sorted(local for local in found if local < too_many):
        most = max(most, found[local])
        pairs.append((local, most))
    return tuple(pairs)


def _points(rows: Sequence[Measurement], cp_degree: int, recompute: str) -> dict[int, int]:
    """Local tokens -> bytes, the most over the shapes of pack."""
    points: dict[int, int] = {}
    for row in rows:
        if row.fits and row.peak_bytes is not None and (row.cp_degree, row.recompute) == (cp_degree, recompute):
            local = row.setting.local_tokens
            points[local] = max(row.peak_bytes, points.get(local, 0))
    return points


def _needs_no_less(setting: Setting, failed: Setting) -> bool:
    """True where `setting` keeps at least what `failed` kept: as many local tokens, no more recomputed."""
    if setting.cp_degree != failed.cp_degree or setting.local_tokens < failed.local_tokens:
        return False
    ours, theirs = setting.policy, failed.policy
    if ours == theirs or ours.granularity is None:
        return True
    return ours.granularity == theirs.granularity == "full" and ours.num_layers <= theirs.num_layers
