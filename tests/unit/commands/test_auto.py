"""`hbp plan --auto`."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import load
from megatron_hbp.planning.core.model import dense_model
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.fit import fit_profile
from megatron_hbp.planning.cost.presets import preset
from tests.unit.commands.running import LENGTHS, done, hbp, refused
from tests.unit.planning.profiles import GRID, PLANTED, profile_of, row_of, saved_by_attention, table_of


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 400, 300), rng.integers(1000, 60_000, 20)])
    np.save(tmp_path / "lengths.npy", lengths)
    np.save(tmp_path / "short.npy", LENGTHS)
    return tmp_path


def command(files, *arguments, lengths="lengths.npy", ranks=8, out="PLAN"):
    base = ["--lengths", files / lengths, "--ranks", ranks, "--step-tokens", 131072, "--out", files / out]
    return ["plan", *base, *arguments]


def test_joint_and_paper(files):
    output = done(*command(files, "--auto"))
    assert (
        "Chosen:" in output and "Tiers tried on 320 samples" in output and "bound: epoch over the lower bound" in output
    )
    assert load(files / "PLAN").tiers[-1].packing_length >= 59_000
    theirs = ["--auto", "--hbp-select", "paper", "--cost", "deepseek-v2-h100", "--memory", "8192:0"]
    assert "as asked" in done(*command(files, *theirs, out="PAPER"))
    assert load(files / "PAPER").tiers[-1].local_tokens <= 8192
    done(*command(files, "--auto", "--equal-local-tokens", "--longest", 20_000, "--overlong", "drop", out="EQUAL"))
    plan = load(files / "EQUAL")
    assert len({tier.local_tokens for tier in plan.tiers}) == 1 and plan.counts["dropped"] > 0


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_auto_plans_what_it_selected_for(files, overlong):
    options = ["--auto", "--longest", 1500, "--overlong", overlong]
    done(*command(files, *options, lengths="short.npy", ranks=4))
    plan = load(files / "PLAN")
    assert plan.lengths.max() == (LENGTHS[LENGTHS <= 1500].max() if overlong == "drop" else 1500)
    assert len(plan.lengths) == ((LENGTHS <= 1500).sum() if overlong == "drop" else len(LENGTHS))


@pytest.mark.parametrize("more", [[], ["--equal-local-tokens"], ["--gpu-memory", 96]])
def test_what_is_chosen_for_4_ranks_fits_them(files, more):
    """The table of 32 ranks was believed: 16K tokens on a rank, 13 GB over on 4."""
    lengths = np.load(files / "lengths.npy")
    np.save(files / "lengths.npy", np.minimum(lengths, 4 * 8192))
    output = done(*command(files, "--auto", *more, ranks=4))
    assert "does not fit" not in output
    memory = more[:2] if "--gpu-memory" in more else []
    simulated = hbp("simulate", files / "PLAN", "--nodes", 1, "--gpus-per-node", 4, "--json", *memory)
    values = json.loads(simulated.stdout)
    assert values["memory"]["headroom"] >= 0
    if not more:  # what is said is what simulate says
        assert f"GPU memory, estimate, GB of 80 {values['memory']['peak'] / 1e9:.1f}" in output


def test_a_model_that_fits_nowhere_is_refused_before_anything_is_tried(files):
    raised = refused(*command(files, "--auto", "--cost", "llama3.1-70b-h100-tp8", "--tp", 8, ranks=1))
    assert "does not fit 8 GPUs of 80 GB" in str(raised)


def test_degrees_that_the_heads_do_not_divide(files):
    """Nine query heads: 4 ranks could not share a pack, and samples beyond one rank could not be planned."""
    nine = dense_model("nine", num_layers=4, hidden=576, num_heads=9, num_kv_heads=3, width=1536, vocabulary=50_000)
    cost_file.save(
        replace(preset("llama3.1-8b-h100"), name="nine", model=nine, recompute_layers=()), files / "nine.json"
    )
    done(*command(files, "--auto", "--cost", files / "nine.json", "--memory", "16384:0", ranks=4))
    assert load(files / "PLAN").tiers[-1].cp_degree == 4


def test_memory_of_the_users_own(files):
    done(*command(files, "--auto", "--memory", "4096:1, 8192:2"))
    tiers = load(files / "PLAN").tiers
    assert {tier.local_tokens for tier in tiers} <= set(range(8193))
    assert all(tier.recompute.num_layers == (1 if tier.local_tokens <= 4096 else 2) for tier in tiers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auto", "--tiers", "16384:cp1"], "exclude each other"),
        (["--tiers", "65536:cp4", "--hbp-select", "paper"], "--hbp-select select tiers: give --auto"),
        ([], "--tiers too (--auto selects tiers)"),
        (["--auto", "--longest", "20000"], "--overlong drop or truncate"),
        (["--auto", "--cost", "deepseek-v2-h100"], "--memory"),
        (["--auto", "--memory", "64:0"], "the longest sample has"),
        (["--auto", "--memory", "16384:99"], "99 recomputed layers, llama3.1-8b-h100 has 32"),
        (["--auto", "--memory", ""], "LOCAL_TOKENS:LAYERS"),
        (["--auto", "--cost", "nosuch"], "unknown cost model"),
        (["--auto", "--profile", "nosuch.json"], "nosuch.json cannot be read"),
        (["--tiers", "65536:cp4", "--profile", "p.json"], "--profile select tiers: give --auto"),
    ],
)
def test_mistakes(files, arguments, message):
    raised = refused(*command(files, *arguments))
    assert isinstance(raised, ConfigError) and message in str(raised)
    assert not (files / "PLAN").exists()


@pytest.mark.parametrize("select", ["joint", "paper"])
def test_a_profile_and_the_cost_model_beside_it(tmp_path, select):
    one = profile_of(limit=4096 * 500, bytes_of=saved_by_attention)
    profile_table.save(one, tmp_path / "p.json")
    cost = fit_profile(one, name="fitted").cost
    cost_file.save(cost, tmp_path / "p.cost.json")
    np.save(tmp_path / "lengths.npy", np.concatenate([np.full(300, 100), np.full(40, 1500), np.full(3, 12000)]))
    done(*command(tmp_path, "--auto", "--profile", tmp_path / "p.json", "--hbp-select", select, ranks=4))
    plan = load(tmp_path / "PLAN")
    found = cost_file.from_json(plan.cost, "", "")
    assert (found.name, found.model, found.machine.memory) == ("fitted", PLANTED.model, 4096 * 500)
    assert max(tier.local_tokens for tier in plan.tiers) <= 4096


def test_the_paper_says_what_its_rows_lack(tmp_path):
    profile_table.save(table_of([row_of(s) for s in GRID if s.tokens < 16384]), tmp_path / "p.json")
    cost_file.save(PLANTED, tmp_path / "p.cost.json")
    np.save(tmp_path / "lengths.npy", np.array([100, 16000, 16384]))
    options = ["--auto", "--profile", tmp_path / "p.json"]
    raised = refused(*command(tmp_path, *options, "--hbp-select", "paper", ranks=4))
    assert isinstance(raised, ConfigError) and "longest sample of 16384" in str(raised)
    done(*command(tmp_path, *options, ranks=4))  # joint goes beyond the rows: 4,096 tokens on each of four ranks
