"""Selection of tiers: the paper's stages on its own table, ours against it, the search against brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from megatron_hbp.commands.auto import parse_memory
from megatron_hbp.planning.select.settings import (
    ProfileRow,
    allowed_degrees,
    iteration_row,
    memory_table,
    rows_of_cost,
    select_paper,
)
from typer.testing import CliRunner

from benchmarks.lengths import generate
from megatron_hbp.commands.plan import app
from megatron_hbp.errors import ConfigError, DataError, HbpError
from megatron_hbp.planning import load, parse_tiers
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import layers
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.planner import make_plan
from megatron_hbp.planning.request import Request
from megatron_hbp.planning.select.joint import account, select_joint
from megatron_hbp.planning.select.search import chain_seconds, grid, nodes, search

COST = preset("llama3.1-8b-h100")
MEMORY = COST.recompute_layers
TABLE_19 = ((8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05))


def rows_19(seconds=None):
    times = seconds or [row[-1] for row in TABLE_19]
    return [
        iteration_row(1024 * length, cp, gc, one, rank_tokens=16384)
        for (length, cp, gc, _), one in zip(TABLE_19, times, strict=True)
    ]


# Worked out by hand from section 3.3, l_max = 128K at CP 8: l_max / c = 16K.
@pytest.mark.parametrize(
    ("seconds", "tiers"),
    [
        # l_best = 16K at CP 1 = l_1 = l_2
        ((2.69, 2.65, 2.83, 3.01, 3.05), "16384:cp1:full28,131072:cp8:full28"),
        # l_best = 8K at CP 2, l_1 = 4K; l_2 = 16K lies above, and cannot fall to CP 1 behind CP 2
        ((2.65, 2.69, 2.83, 3.01, 3.05), "4096:cp1:full8,8192:cp2:full8,16384:cp2:full28,131072:cp8:full28"),
        # l_best = 32K at CP 8, l_1 = 4K; l_2 = 16K merges into 32K
        ((2.69, 2.83, 2.65, 3.01, 3.05), "4096:cp1:full8,32768:cp8:full8,131072:cp8:full28"),
        # l_best = 64K at CP 4, l_1 = 16K = l_2
        ((2.69, 3.01, 2.83, 2.65, 3.05), "16384:cp1:full28,65536:cp4:full28,131072:cp8:full28"),
        # l_best = l_max
        ((2.69, 3.01, 2.83, 3.05, 2.65), "16384:cp1:full28,131072:cp8:full28"),
    ],
)
def test_the_paper_on_table_19_and_permutations(seconds, tiers):
    assert select_paper(rows_19(seconds), 131072) == parse_tiers(tiers)
    assert select_paper(rows_19(seconds)[::-1], 100_000) == parse_tiers(tiers)


def test_the_paper_looks_no_further_than_the_longest_sample():
    assert select_paper(rows_19((9.0, 9.1, 9.2, 9.3, 1.0)), 20_000) == parse_tiers(
        "4096:cp1:full8,8192:cp2:full8,32768:cp8:full8"
    )


def test_stage_1_keeps_the_fastest_that_fits():
    fast = ProfileRow(length=16384, cp_degree=1, seconds=0.1, fits=False)
    slow = iteration_row(16384, 2, 0, 9.0, rank_tokens=16384)
    assert select_paper([*rows_19(), fast, slow], 131072) == parse_tiers("16384:cp1:full28,131072:cp8:full28")


def test_a_longer_tier_takes_the_degree_of_a_shorter_one():
    rows = [iteration_row(32768, 8, 8, 1.0, rank_tokens=16384), iteration_row(65536, 4, 28, 2.0, rank_tokens=16384)]
    found = select_paper(rows, 65536)
    assert [(tier.packing_length, tier.cp_degree) for tier in found] == [(4096, 1), (32768, 8), (65536, 8)]


def test_rows_of_the_cost_model_reproduce_its_table():
    rows = rows_of_cost(COST, [8192, 131072], degrees=(1, 8))
    assert [(r.length, r.cp_degree, r.recompute.num_layers, r.fits) for r in rows] == [
        (8192, 1, 23, True), (8192, 8, 0, True), (131072, 1, 0, False), (131072, 8, 28, True),
    ]  # fmt: skip
    assert rows[0].seconds == pytest.approx(
        COST.tier_cost(parse_tiers("8192:cp1:full23")[0]).seconds(8192, 8192**2)  # one sample a pack
    )
    assert memory_table(rows) == ((1024, 0), (8192, 23), (16384, 28))
    assert select_paper(rows_of_cost(COST, [8192, 16384, 131072], degrees=(1, 2, 8)), 131072)[-1] == rows[-1].tier


def test_degrees_follow_heads_and_ranks():
    assert allowed_degrees(COST, 24) == (1, 2, 4, 8)
    # 40 heads over TP 4 leave 10 a rank: neither 4 nor 8 divides them
    assert allowed_degrees(preset("qwen2.5-32b-h100-tp4"), 16) == (1, 2)


def six_sets():
    parts = {
        "Tulu3": [("tulu3", 20_000)],
        "Tulu3 + LongCite": [("tulu3", 20_000), ("longcite", 43)],
        "OpenHermes + LongCite": [("openhermes", 20_000), ("longcite", 40)],
        "Tulu3 + LongWriter": [("tulu3", 20_000), ("longwriter", 43)],
        "ChatQA2-long": [("chatqa2", 2_000)],
        "LMSys": [("lmsys", 20_000)],
    }
    return {name: np.concatenate([generate(p, num_samples=n) for p, n in some]) for name, some in parts.items()}


@pytest.mark.parametrize(("name", "lengths"), six_sets().items(), ids=six_sets())
@pytest.mark.parametrize("fixed", [0.02, 0.19])
def test_joint_is_never_worse_than_the_paper(name, lengths, fixed):
    cost = replace(COST, micro_batch_seconds=fixed)
    found = select_joint(lengths, cost, num_ranks=32, step_tokens=32 * 16384, longest=131072, num_planned=2)
    paper = next(one for one in found.tried if one.source == "paper")
    assert found.chosen.seconds <= paper.seconds
    assert found.chosen.seconds <= 1.001 * min(one.seconds for one in found.tried)
    assert all(one.tiers[-1].packing_length >= lengths[lengths <= 131072].max() for one in found.tried)
    assert all(t.recompute == layers(least(t.local_tokens)) for one in found.tried for t in one.tiers)
    assert any(one.has_equal_local_tokens for one in found.tried)
    assert str(found.tiers[0]) in found.reason


def least(local_tokens):
    return min(count for limit, count in MEMORY if local_tokens <= limit)


def test_fixed_cost_decides_between_recompute_and_few_micro_batches():
    lengths = six_sets()["Tulu3 + LongCite"]
    local = {}
    for fixed in (0.02, 0.19):
        cost = replace(COST, micro_batch_seconds=fixed)
        found = select_joint(lengths, cost, num_ranks=32, step_tokens=32 * 16384, longest=131072, num_planned=2)
        local[fixed] = max(tier.local_tokens for tier in found.tiers)
    assert local[0.02] < local[0.19] == 16384


def test_search_agrees_with_brute_force():
    lengths = np.concatenate([generate("tulu3", num_samples=2000), generate("longcite", num_samples=60)])
    lengths = lengths[lengths <= 65536]
    for fixed in (0.02, 0.19):
        cost = replace(COST, micro_batch_seconds=fixed)
        settings = nodes((4096, 16384, 32768, 65536), (1, 4, 8), MEMORY, cost=cost, lengths=lengths)
        best = min(
            (
                (chain_seconds(chain, lengths, cost, 8), chain)
                for count in range(1, 5)
                for chain in itertools.combinations(settings, count)
                if covers(chain, lengths)
            ),
            key=lambda pair: pair[0],
        )
        found = search(lengths, settings, cost, 8, keep=1)[0]
        assert found.tiers == best[1]
        assert found.seconds == pytest.approx(best[0])
        equal = search(lengths, settings, cost, 8, keep=3, equal_local_tokens=True)
        assert equal and all(len({tier.local_tokens for tier in chain.tiers}) == 1 for chain in equal)


def test_room_is_filled_with_no_more_than_there_is():
    lengths = np.concatenate([np.full(20, 100), np.full(60, 12_000)])  # 2,000 tokens for 60 times 4,384 of room
    tiers = parse_tiers("2048:cp1,16384:cp1:full28")
    alone = sum(
        float(COST.tier_cost(tier).seconds(tokens, squares)) * count
        for tier, tokens, squares, count in ((tiers[0], 2000, 20 * 100**2, 1), (tiers[1], 12_000, 12_000**2, 60))
    )
    assert chain_seconds(tiers, lengths, COST, 1) == pytest.approx(alone, rel=0.01)


def covers(chain, lengths):
    grow = all(a.packing_length < b.packing_length and a.cp_degree <= b.cp_degree for a, b in itertools.pairwise(chain))
    edges = [0, *(tier.packing_length for tier in chain)]
    return grow and edges[-2] < lengths.max() <= edges[-1] and np.histogram(lengths, np.add(edges, 1))[0].all()


def test_grid_reaches_the_longest_and_is_no_longer_than_it_must():
    lengths = grid(100_001, (1, 2, 4, 8), MEMORY)
    assert lengths[-1] == 131072 and 100_096 in lengths and lengths[0] == 2048
    assert {4096, 6144, 8192, 12288} <= set(lengths)


def test_packs_of_short_samples_are_as_long_as_fits():
    found = select_joint(np.full(5000, 300), COST, num_ranks=4, step_tokens=65536)
    assert found.tiers == parse_tiers("16384:cp1:full28")


def test_account_adds_up():
    found = select_joint(six_sets()["Tulu3"], COST, num_ranks=8, step_tokens=8 * 16384, num_planned=1)
    one = found.chosen
    assert one.fixed_seconds == pytest.approx(COST.micro_batch_seconds * one.num_slots, rel=0.05)
    assert 0 <= one.recompute_seconds < 28 / 32 / 3 * one.seconds and 0 <= one.exchange_seconds < one.seconds
    assert found.bound < one.seconds


def test_what_recompute_costs_a_micro_batch_is_not_its_fixed_cost():
    cost = replace(COST, recompute_seconds=(("full", 8.0),))
    plan = make_plan(
        Samples.of(np.full(8, 4096)), Request(tiers=parse_tiers("4096:cp1:full8"), num_ranks=1, step_tokens=4096)
    )
    one, before = account(plan, cost, "x"), account(plan, COST, "x")
    assert one.fixed_seconds == pytest.approx(before.fixed_seconds)
    assert one.recompute_seconds - before.recompute_seconds == pytest.approx(8 * 8.0 * 8 / COST.num_layers)


def test_joint_goes_on_where_the_paper_has_no_choice():
    found = select_joint(np.full(50, 3000), COST, ((2048, 0),), num_ranks=2, step_tokens=8192)
    assert found.tiers[-1].packing_length >= 3000
    ten_heads = preset("qwen2.5-32b-h100-tp4")  # of a rank: CP degrees 1, 2, 5, 10, and no power of two from 32K on
    found = select_joint(np.full(50, 30000), ten_heads, ((8192, 0),), num_ranks=10, step_tokens=81920)
    assert found.tiers[-1].packing_length >= 30000


def test_errors():
    with pytest.raises(ConfigError, match="no rows"):
        select_paper([], 100)
    with pytest.raises(ConfigError, match="none of the 1 profiled settings fits into memory, not even 1024"):
        select_paper([ProfileRow(length=8192, cp_degree=8, fits=False)], 100)
    with pytest.raises(ConfigError, match="holds the longest sample of 200000"):
        select_paper(rows_19(), 200_000)
    with pytest.raises(ConfigError, match="must divide"):
        ProfileRow(length=100, cp_degree=8, seconds=1.0)
    with pytest.raises(ConfigError, match="took some time"):
        ProfileRow(length=8192, cp_degree=8, seconds=float("nan"))
    with pytest.raises(ConfigError, match=r"CP degree 64.*32 heads"):
        rows_of_cost(COST, [131072], degrees=(64,))
    with pytest.raises(ConfigError, match="--memory"):
        rows_of_cost(preset("deepseek-v2-h100"), [131072], degrees=(8,))
    options = {"num_ranks": 4, "step_tokens": 65536}
    with pytest.raises(ConfigError, match=r"131072 tokens.*65536 at the largest CP degree 4"):
        select_joint(np.array([131072]), COST, **options)
    with pytest.raises(DataError, match="no samples"):
        select_joint(np.array([], int), COST, **options)
    with pytest.raises(DataError, match="at most 5 tokens"):
        select_joint(np.array([10]), COST, **options, longest=5)
    with pytest.raises(ConfigError, match="CP degree 3"):
        select_joint(np.array([10]), COST, **options, degrees=(3,))
    for text in ("", "4096", "4096:x", "0:3", "4096:1,"):
        with pytest.raises(ConfigError, match="LOCAL_TOKENS:LAYERS"):
            parse_memory(text)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "lengths.npy", np.concatenate([rng.integers(20, 400, 300), rng.integers(1000, 60_000, 20)]))
    return tmp_path


def run(files, *arguments):
    base = ["--lengths", files / "lengths.npy", "--ranks", 8, "--step-tokens", 131072, "--out", files / "PLAN"]
    return CliRunner().invoke(app, [str(argument) for argument in (*base, *arguments)])


def test_command(files):
    made = run(files, "--auto")
    assert made.exit_code == 0, made.output
    assert "Chosen:" in made.output and "Tiers tried on 320 samples" in made.output and "over bound" in made.output
    assert load(files / "PLAN").tiers[-1].packing_length >= 59_000
    made = run(files, "--auto", "--hbp-select", "paper", "--cost", "deepseek-v2-h100", "--memory", "8192:0")
    assert made.exit_code == 0, made.output
    assert load(files / "PLAN").tiers[-1].local_tokens <= 8192 and "as asked" in made.output
    made = run(files, "--auto", "--equal-local-tokens", "--longest", 20_000, "--overlong", "drop")
    assert made.exit_code == 0, made.output
    plan = load(files / "PLAN")
    assert len({tier.local_tokens for tier in plan.tiers}) == 1 and plan.counts["dropped"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auto", "--tiers", "16384:cp1"], "exclude each other"),
        (["--tiers", "65536:cp4", "--hbp-select", "paper"], "--hbp-select select tiers: give --auto"),
        ([], r"--tiers too \(--auto selects tiers\)"),
        (["--auto", "--longest", "20000"], "--overlong drop or truncate"),
        (["--auto", "--longest", "0"], "at least 1"),
        (["--auto", "--cost", "deepseek-v2-h100"], "--memory"),
        (["--auto", "--memory", "64:0"], "the longest sample has"),
        (["--auto", "--memory", "16384:99"], "99 recomputed layers, llama3.1-8b-h100 has 32"),
        (["--auto", "--cost", "nosuch"], "unknown cost model"),
        (["--auto", "--profile", "nosuch.json"], "nosuch.json cannot be read"),
        (["--tiers", "65536:cp4", "--profile", "p.json"], "--profile select tiers: give --auto"),
    ],
)
def test_command_errors(files, arguments, message):
    failed = run(files, *arguments)
    assert isinstance(failed.exception, HbpError)
    with pytest.raises(HbpError, match=message):
        raise failed.exception
