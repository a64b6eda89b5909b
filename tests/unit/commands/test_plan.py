"""`hbp plan` with tiers of the user's."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lengths import generate
from megatron_hbp.errors import ConfigError, DataError, PlanError
from megatron_hbp.planning import load
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost.presets import preset
from tests.distributed.conftest import write_store
from tests.unit.commands.running import LENGTHS, done, hbp, refused
from tests.unit.planning.profiles import PLANTED

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ["--ranks", 4, "--tiers", "1024:cp1,8192:cp4", "--step-tokens", 16384]
WIDE = ["--ranks", 8, "--tiers", "16384:cp1,131072:cp8", "--step-tokens", 131072]


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "lengths.npy", LENGTHS)
    np.save(tmp_path / "loss_tokens.npy", LENGTHS // 2)
    return tmp_path


def plan(files, *options, out="PLAN"):
    return done("plan", "--lengths", files / "lengths.npy", *options, "--out", files / out)


def test_plan_then_show(files):
    made = plan(files, *OPTIONS)
    assert "ABR" in made and "naive" in made and "N = 4" in made
    shown = hbp("plan", "show", files / "PLAN", "--format", "jsonl").stdout
    rows = [json.loads(line) for line in shown.splitlines()]
    assert sorted(sample for row in rows for sample in row["samples"]) == list(range(320))
    assert f"Plan {load(files / 'PLAN').hash[:12]}" in done("plan", "show", files / "PLAN")


def test_plan_from_a_store(tmp_path):
    store = write_store(tmp_path / "STORE", num_samples=20, seed=0)
    done("plan", "--store", store.path, *OPTIONS, "--out", tmp_path / "PLAN", "--epochs", 2)
    made = load(tmp_path / "PLAN")
    assert made.data.store_fingerprint == store.fingerprint
    np.testing.assert_array_equal(np.bincount(made.sample_ids), 2)


def test_a_damaged_store_is_not_planned(tmp_path):
    store = write_store(tmp_path / "STORE", num_samples=20, seed=0)
    np.save(store.path / "lengths.npy", store.lengths[:-1])
    assert isinstance(refused("plan", "--store", store.path, *OPTIONS, "--out", tmp_path / "PLAN"), DataError)


def test_epochs_are_compared_with_as_many_naive_ones(files):
    once, thrice = (plan(files, *OPTIONS, "--epochs", n, out=f"PLAN{n}") for n in (1, 3))
    seconds = [re.findall(r"of the plan, seconds ([\d.,]+) ([\d.,]+)", text) for text in (once, thrice)]
    ((first,), (three,)) = [[[float(value.replace(",", "")) for value in row] for row in rows] for rows in seconds]
    assert three == pytest.approx([3 * value for value in first], rel=0.02)
    assert "320 samples planned 960 times in all" in thrice


def test_reschedule(files):
    plan(files, *OPTIONS)
    done("plan", "reschedule", files / "PLAN", "--ranks", 8, "--from-step", 2, "--out", files / "NEW")
    old, new = load(files / "PLAN"), load(files / "NEW")
    assert new.num_ranks == 8 and new.num_steps == old.num_steps - 2
    done("plan", "reschedule", files / "PLAN", "--ranks", 8, "--slot-multiple", 4, "--out", files / "FOURS")
    assert (load(files / "FOURS").num_micro_batches % 4 == 0).all()


def test_compare(files):
    options = ["--ranks", 8, "--tiers", "1024:cp1,8192:cp8", "--step-tokens", 16384]
    text = done("plan", "compare", "--lengths", files / "lengths.npy", *options, "--picture", files / "picture.png")
    assert "HBP, lockstep" in text and (files / "picture.png").stat().st_size > 1000


def test_another_packing_of_the_papers_pipeline(files):
    plan(files, *OPTIONS, "--packing", "FFD")
    assert load(files / "PLAN").hash != (plan(files, *OPTIONS, out="OURS"), load(files / "OURS").hash)[1]
    assert "requires --schedule lockstep" in str(
        refused("plan", "--lengths", files / "lengths.npy", *OPTIONS, "--packing", "FFD", "--schedule", "gang",
                "--out", files / "GANG")
    )  # fmt: skip


def test_the_default_cost_model_is_the_same_named_or_not(files):
    """Without --cost no recompute was filled in: the same command with the default's name made another plan."""
    plan(files, *WIDE)
    plan(files, *WIDE, "--cost", "llama3.1-8b-h100", out="NAMED")
    made = load(files / "PLAN")
    assert made.hash == load(files / "NAMED").hash
    assert [tier.recompute.num_layers for tier in made.tiers] == [28, 28]


def test_none_asks_for_no_recompute(files):
    output = plan(files, "--ranks", 8, "--tiers", "16384:cp1:none,131072:cp8", "--step-tokens", 131072)
    assert [tier.recompute.num_layers for tier in load(files / "PLAN").tiers] == [0, 28]
    assert "does not fit into memory: tier 16384:cp1 needs full28 to fit" in output


def test_a_cost_file_is_part_of_the_plan_by_what_it_says_not_by_its_path(files, monkeypatch):
    cost_file.save(replace(preset("llama3.1-8b-h100"), micro_batch_seconds=0.3), files / "c.json")
    monkeypatch.chdir(files)
    plan(files, *OPTIONS, "--cost", "c.json", out="RELATIVE")
    plan(files, *OPTIONS, "--cost", files / "c.json", out="ABSOLUTE")
    assert load(files / "RELATIVE").hash == load(files / "ABSOLUTE").hash
    (files / "c.json").unlink()
    elsewhere = files / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "llama3.1-8b-h100" in done("plan", "show", "../RELATIVE")
    simulated = json.loads(hbp("simulate", "../RELATIVE", "--nodes", 1, "--gpus-per-node", 4, "--json").stdout)
    assert simulated["epoch_seconds"] > 0
    done("plan", "reschedule", "../RELATIVE", "--ranks", 8, "--out", "NEW")


def test_another_cost_model_shows_other_seconds(files):
    plan(files, *OPTIONS)
    own, other = (done("plan", "show", files / "PLAN", *more) for more in ([], ["--cost", "deepseek-v2-h100"]))
    assert "modelled by llama3.1-8b-h100" in own and "modelled by deepseek-v2-h100" in other


def test_a_plan_is_made_shown_and_simulated_with_a_cost_model_of_the_users(files):
    cost_file.save(PLANTED, files / "c.json")
    plan(files, *OPTIONS, "--cost", files / "c.json")
    assert cost_file.from_json(load(files / "PLAN").cost, "", "").model == PLANTED.model
    assert "modelled by planted" in done("plan", "show", files / "PLAN")


@pytest.mark.parametrize("cost", ["llama3.1-8b-h100", "planted"])
def test_a_saved_cost_model_keeps_its_memory_and_is_simulated_at_another_tensor_parallel_width(files, cost):
    """The shape of the model was found by the preset's name: a file had no memory, and no other TP."""
    cost_file.save(PLANTED if cost == "planted" else preset(cost), files / "mine.json")
    made = plan(files, *OPTIONS, "--cost", files / "mine.json")
    assert "GPU memory, estimate, GB of 80" in made
    for tp in (1, 2):
        values = json.loads(
            hbp("simulate", files / "PLAN", "--nodes", 1, "--gpus-per-node", 4 * tp, "--tp", tp, "--json").stdout
        )
        parameters = {"llama3.1-8b-h100": 8.03e9, "planted": 155.88e6}[cost]
        assert values["memory"]["states"] == pytest.approx(parameters / tp * (6 + 12 / 4), rel=1e-3)


def test_a_plan_that_does_not_fit_says_so_and_is_written(files):
    """Two GPUs cannot hold weights, gradients and optimizer of the 8B; nothing was said."""
    output = plan(files, "--ranks", 2, "--tiers", "1024:cp1,8192:cp2", "--step-tokens", 16384)
    assert "note: the plan does not fit into memory: llama3.1-8b does not fit 2 GPUs of 80 GB" in output
    assert load(files / "PLAN").num_ranks == 2
    output = plan(files, *OPTIONS, "--gpu-memory", 800, out="LARGE")
    assert "does not fit" not in output


def test_naive_packing_that_is_as_fast_is_said(files):
    np.save(files / "lengths.npy", np.full(64, 1024))
    output = plan(files, "--ranks", 4, "--tiers", "1024:cp1", "--step-tokens", 16384)
    assert "note: naive packing is modelled as fast" in output
    np.save(files / "lengths.npy", np.append(generate("mix", num_samples=3000), 131072))
    assert "modelled as fast" not in plan(files, *WIDE, out="OTHER")


@pytest.mark.parametrize(
    ("step_tokens", "is_said"), [(1000, True), (3600, True), (4096, False), (16384, False), (10**6, False)]
)
def test_steps_larger_than_asked_for_are_said(files, step_tokens, is_said):
    """A step is one micro-batch on each of four ranks at least, 4,096 tokens here; one of 3,600 is 12% over that."""
    np.save(files / "lengths.npy", np.full(640, 64))
    output = plan(files, "--ranks", 4, "--tiers", "1024:cp1", "--step-tokens", step_tokens)
    assert (f"a step holds 4,096 tokens (median), {step_tokens:,} were asked for" in output) == is_said
    assert ("were asked for" in output) == is_said


def test_a_single_step_larger_than_asked_for_is_said(files):
    np.save(files / "lengths.npy", np.full(60, 64))
    output = plan(files, "--ranks", 4, "--tiers", "1024:cp1", "--step-tokens", 1000)
    assert load(files / "PLAN").num_steps == 1 and "a step holds 3,840 tokens (median), 1,000 were" in output


def test_a_last_step_that_is_smaller_is_no_news(files):
    np.save(files / "lengths.npy", np.full(100, 64))
    output = plan(files, "--ranks", 4, "--tiers", "1024:cp1", "--step-tokens", 4096)
    assert load(files / "PLAN").num_steps == 2 and "were asked for" not in output


def test_the_readmes_plan_fits_the_gpus_it_is_for(tmp_path):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ *\.venv/bin/hbp plan --store store (.*--tiers.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    ranks = int(words[words.index("--ranks") + 1])
    np.save(tmp_path / "lengths.npy", np.append(generate("mix", num_samples=20_000), 131072))
    words[words.index("--out") + 1] = str(tmp_path / "train.plan")
    output = done("plan", "--lengths", tmp_path / "lengths.npy", *words)
    assert "does not fit" not in output and "were asked for" not in output
    values = json.loads(hbp("simulate", tmp_path / "train.plan", "--nodes", ranks // 8, "--json").stdout)
    assert ranks == 8 and values["memory"]["headroom"] >= 0


@pytest.mark.parametrize("name", ["lengths.npy", "loss_tokens.npy"])
def test_out_never_replaces_what_is_no_plan(files, name):
    """One slip of --out, and the data set was gone."""
    before = (files / name).read_bytes()
    for more in ([], ["--overwrite"]):
        raised = refused("plan", "--lengths", files / "lengths.npy", *OPTIONS, "--out", files / name, *more)
        assert "exists and is not a plan" in str(raised) and raised.exit_code == 78
    assert (files / name).read_bytes() == before


def test_out_replaces_a_plan_only_where_that_is_said(files):
    plan(files, *OPTIONS)
    before = (files / "PLAN").read_bytes()
    raised = refused("plan", "--lengths", files / "lengths.npy", *OPTIONS, "--seed", 1, "--out", files / "PLAN")
    assert "is a plan already" in str(raised) and "--overwrite" in str(raised)
    assert (files / "PLAN").read_bytes() == before
    plan(files, *OPTIONS, "--seed", 1, "--overwrite")
    assert load(files / "PLAN").seed == 1
    raised = refused("plan", "reschedule", files / "PLAN", "--ranks", 8, "--out", files / "PLAN")
    assert "is a plan already" in str(raised)
    done("plan", "reschedule", files / "PLAN", "--ranks", 8, "--out", files / "PLAN", "--overwrite")
    assert load(files / "PLAN").num_ranks == 8


def broken(files, name, values):
    np.save(files / name, values)
    return files / name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda f: ["--lengths", f / "none.npy"], DataError, "cannot be read"),
        (lambda _: ["--lengths", __file__], DataError, "not a NumPy .npy file"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.ones(3))], DataError, "whole numbers"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.array([{}], object))], DataError, "not a NumPy"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.array([5, -1]))], DataError, "sample 1 has length -1"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.array([9000]))], DataError, "longer than the longest tier"),
        (lambda f: ["--lengths", f / "lengths.npy", "--ranks", "6"], ConfigError, "do not divide"),
        (lambda f: ["--lengths", f / "lengths.npy", "--cost", "x"], ConfigError, "unknown cost model"),
        (lambda f: ["--lengths", f / "lengths.npy", "--cost", "x.json"], ConfigError, "x.json cannot be read"),
        (lambda f: ["--lengths", f / "lengths.npy", "--store", f], ConfigError, "either --lengths"),
        (lambda f: ["--store", f / "none"], DataError, "no such token store"),
        (lambda f: ["--store", f, "--loss-tokens", f / "loss_tokens.npy"], ConfigError, "goes with --lengths"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.array([2**40]))], DataError, "a plan counts up to"),
        (
            lambda f: ["--lengths", broken(f, "a.npy", np.array([2**64 - 1], np.uint64))],
            DataError,
            "more than a sample",
        ),
        (lambda f: ["--lengths", f / "lengths.npy", "--step-tokens", 10**25], ConfigError, "step tokens must be"),
        (
            lambda f: ["--lengths", f / "lengths.npy", "--tiers", f"{10**12}:cp1:none"],
            ConfigError,
            "a pack holds at most",
        ),
        (lambda f: ["--lengths", f / "lengths.npy", "--tiers", f"{10**20}:cp1"], ConfigError, "not a whole number"),
        (lambda f: ["--lengths", f / "lengths.npy", "--tiers", "65536:cp1"], ConfigError, "do not fit into memory"),
        (lambda f: ["--lengths", f / "lengths.npy", "--tiers", "9999:cp1:sel="], ConfigError, "at least one module"),
        (lambda f: ["--lengths", f / "lengths.npy", "--memory", "4096"], ConfigError, "is not LOCAL_TOKENS:LAYERS"),
        (lambda f: ["--lengths", f / "lengths.npy", "--ep", 3], ConfigError, "do not divide by EP 3"),
        (
            lambda f: ["--lengths", f / "lengths.npy", "--tiers", "9999:cp1:full99"],
            ConfigError,
            "more than the 32 layers",
        ),
        (lambda f: ["--lengths", f / "lengths.npy", "--out", ""], ConfigError, "does not name a file"),
        (
            lambda f: ["--lengths", f / "lengths.npy", "--loss-tokens", broken(f, "b.npy", LENGTHS + 1)],
            DataError,
            "loss tokens of",
        ),
        (
            lambda f: ["--lengths", f / "lengths.npy", "--loss-tokens", broken(f, "b.npy", LENGTHS[1:])],
            DataError,
            "both must match",
        ),
    ],
)
def test_mistakes_are_named(files, arguments, error, message):
    raised = refused("plan", *OPTIONS, "--out", files / "PLAN", *arguments(files))
    assert isinstance(raised, error)
    assert message in str(raised)
    assert not (files / "PLAN").exists()


def test_missing_options_are_named(files):
    raised = refused("plan", "--lengths", files / "lengths.npy", "--ranks", 4)
    assert "--tiers, --step-tokens, --out" in str(raised)


def test_showing_what_is_no_plan(files):
    assert isinstance(refused("plan", "show", files / "lengths.npy"), PlanError)
