"""Tables in a pipe: 80 columns, no digit and no heading cut, whatever the numbers."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from benchmarks.lengths import generate
from megatron_hbp.planning import Request, Samples, parse_tiers
from megatron_hbp.planning.compare import compare, contenders
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.cost.fit import fit_profile
from megatron_hbp.planning.cost.presets import preset
from megatron_hbp.planning.select.joint import select_joint
from megatron_hbp.planning.simulate.simulator import simulate
from megatron_hbp.report.plan_tables import comparison_table, metrics_table, tier_table
from megatron_hbp.report.profile_tables import check_table, fit_table
from megatron_hbp.report.selection import selection_table
from megatron_hbp.report.simulation import idle_table, summary_table
from tests.unit.planning.plans import plan_of
from tests.unit.planning.profiles import profile_of, saved_by_attention

COST = preset("llama3.1-8b-h100")
LENGTHS = np.append(generate("mix", num_samples=2000), 131072)
TIERS = "16384:cp1:full28,32768:cp2:full28:exchange=all_gather:kernel=flash:align128,131072:cp8:full28"
REQUEST = Request(tiers=parse_tiers(TIERS), num_ranks=8, step_tokens=262144, cost=COST)


def printed(table):
    output = StringIO()
    Console(width=80, file=output).print(table)
    return output.getvalue()


def check_whole(table):
    """Lines of at most 80 columns; numbers in one piece; every word of headings, labels, title and caption."""
    text = printed(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in (table.title, table.caption, *(column.header for column in table.columns)):
        assert set(str(words or "").split()) <= set(text.split()), words
    for column in table.columns:
        for cell in map(str, column.cells):
            if column.justify == "right":
                assert cell in text
            else:  # words that do not fit are broken, and go on in the next line
                assert column.overflow == "fold" and not column.no_wrap
                assert {word for word in cell.split() if len(word) <= 18} <= set(text.split()), cell


@pytest.fixture(scope="module")
def plan():
    return plan_of(LENGTHS, TIERS, num_ranks=8, step_tokens=262144, cost=COST)


def grown(plan):
    """The same plan, as if every sample had a hundred thousand tokens for one."""
    return replace(plan, lengths=(plan.lengths.astype(np.int64) * 100_000))


def test_tiers(plan):
    check_whole(tier_table(plan))
    check_whole(tier_table(grown(plan)))


def test_measures(plan):
    table = metrics_table({"HBP": plan, "naive, all in 131,072": plan}, COST, Topology(num_nodes=1))
    assert "GPU memory, estimate, GB of 80" in printed(table)
    check_whole(table)
    check_whole(metrics_table({"HBP": grown(plan), "naive, all in 131,072": grown(plan)}, COST))


def test_comparison(plan):
    found = list(compare(Samples.of(LENGTHS[:300]), REQUEST, contenders()))
    check_whole(comparison_table(found, 1.0))
    slow = [replace(one, planning_seconds=12345.6) for one in found]
    slow = [replace(one, metrics=replace(one.metrics, epoch_seconds=1234.5)) for one in slow]
    check_whole(comparison_table(slow, 1.0))


@pytest.mark.parametrize("seconds", [1.0, 1e5])
def test_selection(seconds):
    found = select_joint(Samples.of(LENGTHS), replace(REQUEST, tiers=()), num_planned=3)
    tried = tuple(
        replace(
            one, metrics=replace(one.metrics, epoch_seconds=seconds * one.seconds), exchange_seconds=seconds,
            recompute_seconds=seconds,
        )
        for one in found.tried
    )  # fmt: skip
    table = selection_table(replace(found, tried=tried), cost_model="a model with a name")
    check_whole(table)
    assert {"chosen", "paper"} <= set(printed(table).split())


@pytest.mark.parametrize("num_nodes", [1, 8])
def test_simulation(plan, num_nodes):
    topology = Topology(num_nodes=num_nodes, pp=num_nodes)
    found = simulate(plan, COST, topology)
    assert found.memory is not None
    for one in (found, replace(found, memory=replace(found.memory, stage=63, step=123456, rank=1023, limit=1e12))):
        check_whole(summary_table(plan, one))
        check_whole(idle_table(one))


def test_profiles(plan):
    table = profile_of(limit=4096 * 1100, bytes_of=saved_by_attention)
    refused = [replace(row, why="predicted 60.00 GiB, the limit is 40.00 GiB") for row in table.rows if not row.fits]
    assert refused
    table = replace(table, rows=(*(row for row in table.rows if row.fits), *refused))
    fit = fit_profile(table, name="x")
    check_whole(fit_table(table, fit))
    assert {"predicted", "60.00", "40.00"} <= set(printed(fit_table(table, fit)).split())
    seconds = np.linspace(1, 2000, plan.num_packs)
    check_whole(check_table(plan, seconds, seconds[::-1]))
