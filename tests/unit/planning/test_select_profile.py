"""From a profile table to tiers: seconds carried over, what fits, selective recompute, the command."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_hbp.commands.plan import app
from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import load
from megatron_hbp.planning.core.tiers import Recompute, layers
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.fit import fit_profile
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.select.from_profile import profiled
from megatron_hbp.planning.select.joint import select_joint
from megatron_hbp.planning.select.settings import mean_length
from megatron_hbp.profiling.grid import parse_policies, settings
from tests.unit.planning.profiles import PLANTED, row_of, table_of

ATTENTION = Recompute(granularity="selective", modules=("core_attn",))
POLICIES = parse_policies("none,full2,full4,sel=core_attn", 4)
GRID = settings((1024, 4096, 8192, 16384), (1, 2, 4), POLICIES, unit=1, most_local=4096)
LENGTHS = np.concatenate([np.full(300, 100), np.full(40, 1500), np.full(3, 12000)])


def table(limit=None, bytes_of=None):
    rows = [row_of(setting) for setting in GRID]
    if limit is not None:
        rows = [replace(row, peak_bytes=bytes_of(row)) for row in rows]
        rows = [replace(row, fits=row.peak_bytes <= limit) for row in rows]
    return table_of(rows, limit)


def per_token(row):
    """Attention keeps little of a layer here: recomputing it alone saves two thirds of the bytes."""
    policy = row.setting.policy
    saved = 900 if policy == ATTENTION else 300 * policy.num_layers
    return row.setting.local_tokens * (1400 - saved)


def test_seconds_are_those_of_packs_of_these_samples():
    found = profiled(table(), PLANTED, LENGTHS, 4)
    assert len(found.rows) == len({(s.tokens, s.cp_degree, s.recompute) for s in GRID}) and found.degrees == (1, 2, 4)
    for row in found.rows:
        wanted = PLANTED.tier_cost(row.tier).seconds(row.length, row.length * mean_length(LENGTHS, row.length))
        assert row.seconds == pytest.approx(wanted)  # rows of the planted model are carried over exactly


def test_without_a_limit_nothing_is_recomputed_and_no_more_fits_than_was_run():
    found = profiled(table(), PLANTED, LENGTHS, 4)
    assert found.memory[-1] == (4096, 0) and found.selective == ((4096, ATTENTION),)
    chosen = select_joint(
        LENGTHS, PLANTED, found.memory, num_ranks=4, step_tokens=65536, degrees=found.degrees, rows=found.rows,
        selective=found.selective,
    )  # fmt: skip
    assert all(tier.recompute == Recompute() and tier.local_tokens <= 4096 for tier in chosen.tiers)


def test_another_models_cost_is_refused_and_memory_is_the_profiles_own():
    with pytest.raises(ConfigError, match="of a model of 4 layers, cost model llama"):
        profiled(table(), preset("llama3.1-8b-h100"), LENGTHS, 4)
    generous = replace(PLANTED, recompute_layers=((131072, 0),))
    assert profiled(table(), generous, LENGTHS, 4).memory[-1][0] == 4096


def test_degrees_that_the_heads_do_not_allow_are_left_out():
    six = replace(PLANTED, attention=replace(PLANTED.attention, num_query_heads=6))
    assert profiled(table(), six, LENGTHS, 4).degrees == (1, 2)


def test_what_was_seen_not_to_fit_is_not_chosen():
    one = table(limit=2048 * 1100, bytes_of=per_token)
    found = profiled(one, PLANTED, LENGTHS, 4)
    assert found.selective == ((4096, ATTENTION),)  # 4,096 x 500 bytes fit, 4,096 x 800 with two layers do not
    assert {(row.length // row.cp_degree, row.recompute) for row in found.rows if not row.fits} >= {(4096, layers(2))}
    less = profiled(table(limit=4096 * 499, bytes_of=per_token), PLANTED, LENGTHS, 4)
    assert less.selective == ((2048, ATTENTION),)


def test_selective_recompute_is_chosen_where_it_is_the_cheapest_that_fits():
    one = table(limit=4096 * 500, bytes_of=per_token)
    cost = fit_profile(one, name="fitted").cost
    found = profiled(one, cost, LENGTHS, 4)
    options = {"num_ranks": 4, "step_tokens": 65536, "degrees": found.degrees, "rows": found.rows}
    layered = select_joint(LENGTHS, cost, found.memory, **options)
    chosen = select_joint(LENGTHS, cost, found.memory, **options, selective=found.selective)
    assert any(tier.recompute == ATTENTION for tier in chosen.tiers)
    assert all(tier.recompute != ATTENTION for tier in layered.tiers)
    assert chosen.bound <= chosen.chosen.seconds <= layered.chosen.seconds


def test_ranks_that_no_measured_degree_divides():
    with pytest.raises(ConfigError, match="no CP degree of the profile divides 5 ranks"):
        profiled(table_of([row_of(s) for s in GRID if s.cp_degree > 1]), PLANTED, LENGTHS, 5)


@pytest.mark.parametrize("select", ["joint", "paper"])
def test_the_command_plans_with_a_profile(tmp_path, select):
    one = table(limit=4096 * 500, bytes_of=per_token)
    profile_table.save(one, tmp_path / "p.json")
    cost_file.save(fit_profile(one, name="x").cost, tmp_path / "p.cost.json")
    np.save(tmp_path / "l.npy", LENGTHS)
    flags = f"--lengths {tmp_path}/l.npy --ranks 4 --step-tokens 65536 --auto --profile {tmp_path}/p.json"
    made = CliRunner().invoke(app, [*flags.split(), "--hbp-select", select, "--out", str(tmp_path / "PLAN")])
    assert made.exit_code == 0, made.output
    assert load(tmp_path / "PLAN").cost_model == str(tmp_path / "p.cost.json")
    assert max(tier.local_tokens for tier in load(tmp_path / "PLAN").tiers) <= 4096


def test_the_paper_says_what_its_rows_lack(tmp_path):
    profile_table.save(table(), tmp_path / "p.json")
    cost_file.save(PLANTED, tmp_path / "p.cost.json")
    np.save(tmp_path / "l.npy", np.array([100, 16000, 16384]))
    short = table_of([row_of(s) for s in GRID if s.tokens < 16384])
    profile_table.save(short, tmp_path / "p.json")
    flags = f"--lengths {tmp_path}/l.npy --ranks 4 --step-tokens 65536 --auto --profile {tmp_path}/p.json"
    command = [*flags.split(), "--out", str(tmp_path / "PLAN")]
    failed = CliRunner().invoke(app, [*command, "--hbp-select", "paper"])
    assert isinstance(failed.exception, ConfigError) and "longest sample of 16384" in str(failed.exception)
    made = CliRunner().invoke(app, command)  # joint goes beyond the rows: 4,096 tokens on each of four ranks
    assert made.exit_code == 0, made.output
