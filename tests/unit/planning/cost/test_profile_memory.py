"""Memory on lines through two readings: what fits, how much must be recomputed, what is seen coming."""

from dataclasses import replace

import pytest

from megatron_hbp.planning.cost.profile_memory import (
    layers_by_local_tokens,
    layers_that_fit,
    peak_of,
    predict_fit,
    with_limit,
)
from megatron_hbp.planning.cost.profile_table import Setting
from tests.unit.planning.profiles import HEADER, row_of, table_of


def test_the_fewest_layers_that_fit():
    rows = [row_of(Setting(tokens=1024, cp_degree=1, recompute=f)) for f in ("none", "full4")]  # 1000 and 200 a token
    cases = {1000: 0, 999: 1, 800: 1, 700: 2, 200: 4}
    for per_token, layers in cases.items():
        assert layers_that_fit(rows, 1024, 1, 1024.0 * per_token, 4) == layers
    assert layers_that_fit(rows, 1024, 1, 1024.0 * 199, 4) is None
    assert layers_that_fit(rows, 2048, 1, 1e9, 4) is None


def test_what_was_seen_not_to_fit_counts_more_than_a_line():
    none, full2, full4 = (row_of(Setting(tokens=1024, cp_degree=1, recompute=f)) for f in ("none", "full2", "full4"))
    failed = replace(none, fits=False, seconds=None, peak_bytes=None, why="out of memory")
    flat = [replace(full2, peak_bytes=60), replace(full4, peak_bytes=55)]
    assert layers_that_fit([failed, *flat], 1024, 1, 80, 4) == 1  # the line says 0
    assert layers_that_fit([full2, replace(full4, peak_bytes=full2.peak_bytes)], 1024, 1, 1e9, 4) == 2
    over = replace(none, fits=False, why="took more")  # measured, over the limit: a reading all the same
    assert layers_that_fit([over, full4], 1024, 1, 1024.0 * 700, 4) == 2


def test_the_table_ends_where_nothing_fits_at_one_degree():
    rows = [row_of(Setting(tokens=n, cp_degree=1, recompute="none")) for n in (2048, 4096)]
    failed = row_of(Setting(tokens=8192, cp_degree=2, recompute="none"))
    failed = replace(failed, fits=False, seconds=None, peak_bytes=None, why="out of memory")
    assert layers_by_local_tokens(table_of([*rows, failed], limit=1e9)) == ((2048, 0),)


def test_another_memory_limit_judges_the_rows_anew():
    ran = row_of(Setting(tokens=1024, cp_degree=1, recompute="none"))
    lost = replace(ran, fits=False, seconds=None, peak_bytes=None)
    died = replace(lost, recompute="full2", why="out of memory")
    foreseen = replace(lost, recompute="full4", why="predicted 60.00 GiB, the limit is 40.00 GiB")
    table = table_of([ran, died, foreseen], limit=2e6)
    low = with_limit(table, 1e6)
    assert [(row.fits, row.why) for row in low.rows] == [(False, "took 0.00 GiB, over the limit"), (False, died.why)]
    back = with_limit(low, 2e6)
    assert back.rows == (ran, died) and back.memory_limit == 2e6  # the foreseen one is to be tried again
    assert with_limit(table, 2e6) is table


def test_what_cannot_fit_is_seen_coming():
    rows = [row_of(Setting(tokens=n, cp_degree=1, recompute="none")) for n in (1024, 2048)]
    longer = Setting(tokens=8192, cp_degree=1, recompute="none")

    def refused(limit: float, setting: Setting = longer, count: int = 2) -> str:
        return predict_fit(table_of(rows[:count], limit=limit), setting).refused

    assert peak_of(table_of(rows), 8192, 1, "none") == pytest.approx(8192 * 1000)
    assert refused(8192 * 1000.0) == ""
    assert "predicted" in refused(8191 * 1000.0)
    assert refused(1.0, count=1) == ""  # one reading makes no line
    assert refused(1.0, replace(longer, cp_degree=2)) == ""  # another degree, other buffers


def test_logits_grow_to_one_chunk_and_no_further():
    header = replace(HEADER, supervised=0.5, logits_bytes=100.0, logits_rows=1000)

    def peak(local: int, layers: int) -> int:
        return 500_000 + (300 - 50 * layers) * local + 100 * min(local // 2, 1000)

    rows = [
        replace(row_of(Setting(tokens=n, cp_degree=1, recompute=name)), peak_bytes=peak(n, layers))
        for n in (1024, 4096)
        for name, layers in (("none", 0), ("full4", 4))
    ]
    table = replace(table_of(rows), header=header)
    for local in (1024, 1536, 2000, 3000, 8192):
        assert peak_of(table, local, 1, "none") == pytest.approx(peak(local, 0))
        assert peak_of(table, local, 1, "full1") == pytest.approx(peak(local, 1))
    assert peak_of(table, 2000, 1, "sel=mlp") is None


def test_what_keeps_more_than_what_did_not_fit_is_not_tried():
    failed = replace(row_of(Setting(tokens=4096, cp_degree=1, recompute="full2")), fits=False, seconds=None)

    def refused(tokens: int, recompute: str, cp_degree: int = 1) -> bool:
        return bool(
            predict_fit(table_of([failed]), Setting(tokens=tokens, cp_degree=cp_degree, recompute=recompute)).refused
        )

    assert refused(8192, "full2") and refused(4096, "none") and refused(4096, "full1")
    assert not (refused(2048, "none") or refused(4096, "full3") or refused(4096, "sel=mlp") or refused(8192, "none", 2))
