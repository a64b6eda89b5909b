"""`hbp plan` as a user calls it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_hbp.commands.plan import app
from megatron_hbp.errors import ConfigError, DataError, HbpError, PlanError
from megatron_hbp.planning import load
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost.model import preset
from tests.distributed.conftest import write_store

RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(20, 400, 300), RNG.integers(1000, 8192, 20)])
OPTIONS = ["--ranks", "4", "--tiers", "1024:cp1,8192:cp4", "--step-tokens", "16384"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "lengths.npy", LENGTHS)
    np.save(tmp_path / "loss_tokens.npy", LENGTHS // 2)
    return tmp_path


def test_plan_then_show(files):
    made = run("--lengths", files / "lengths.npy", *OPTIONS, "--out", files / "PLAN")
    assert made.exit_code == 0, made.output
    assert "ABR" in made.output and "naive" in made.output and "N = 4" in made.output
    shown = run("show", files / "PLAN", "--format", "jsonl")
    rows = [json.loads(line) for line in shown.output.splitlines()]
    assert sorted(sample for row in rows for sample in row["samples"]) == list(range(320))
    assert "Plan" in run("show", files / "PLAN").output


def test_plan_from_a_store(tmp_path):
    store = write_store(tmp_path / "STORE", num_samples=20, seed=0)
    done = run("--store", store.path, *OPTIONS, "--out", tmp_path / "PLAN", "--epochs", 2)
    assert done.exit_code == 0, done.output
    plan = load(tmp_path / "PLAN")
    assert plan.data.store_fingerprint == store.fingerprint
    np.testing.assert_array_equal(np.bincount(plan.sample_ids), 2)


def test_a_damaged_store_is_not_planned(tmp_path):
    store = write_store(tmp_path / "STORE", num_samples=20, seed=0)
    np.save(store.path / "lengths.npy", store.lengths[:-1])
    assert isinstance(run("--store", store.path, *OPTIONS, "--out", tmp_path / "PLAN").exception, DataError)


def test_epochs_are_compared_with_as_many_naive_ones(files):
    once, thrice = (
        run("--lengths", files / "lengths.npy", *OPTIONS, "--out", files / "PLAN", "--epochs", n).output for n in (1, 3)
    )
    seconds = [
        [float(cell.replace(",", "")) for cell in line.split("│")[2:4]]
        for line in (once + thrice).splitlines() if "modelled time" in line
    ]  # fmt: skip
    assert seconds[1] == pytest.approx([3 * value for value in seconds[0]], rel=0.02)
    assert "320 samples planned 960 times in all" in thrice


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_auto_plans_what_it_selected_for(files, overlong):
    options = ["--ranks", "4", "--step-tokens", "16384", "--auto", "--longest", 1500, "--overlong", overlong]
    done = run("--lengths", files / "lengths.npy", *options, "--out", files / "PLAN")
    assert done.exit_code == 0, done.output
    plan = load(files / "PLAN")
    assert plan.lengths.max() == (LENGTHS[LENGTHS <= 1500].max() if overlong == "drop" else 1500)
    assert len(plan.lengths) == ((LENGTHS <= 1500).sum() if overlong == "drop" else len(LENGTHS))


def test_a_named_cost_model_brings_its_recompute(files):
    tiers = ["--ranks", "8", "--tiers", "16384:cp1,131072:cp8", "--step-tokens", "131072"]
    run("--lengths", files / "lengths.npy", *tiers, "--cost", "llama3.1-8b-h100", "--out", files / "PLAN")
    assert [tier.recompute.num_layers for tier in load(files / "PLAN").tiers] == [28, 28]


def test_reschedule(files):
    run("--lengths", files / "lengths.npy", *OPTIONS, "--out", files / "PLAN")
    done = run("reschedule", files / "PLAN", "--ranks", 8, "--from-step", 2, "--out", files / "NEW")
    assert done.exit_code == 0, done.output
    old, new = load(files / "PLAN"), load(files / "NEW")
    assert new.num_ranks == 8 and new.num_steps == old.num_steps - 2
    run("reschedule", files / "PLAN", "--ranks", 8, "--slot-multiple", 4, "--out", files / "NEW")
    assert (load(files / "NEW").num_micro_batches % 4 == 0).all()


def test_a_plan_whose_cost_file_is_elsewhere_can_be_shown(files):
    cost_file.save(replace(preset("llama3.1-8b-h100"), recompute_layers=()), files / "c.json")
    run("--lengths", files / "lengths.npy", *OPTIONS, "--cost", files / "c.json", "--out", files / "PLAN")
    (files / "c.json").rename(files / "moved.json")
    assert "or name another with --cost" in str(run("show", files / "PLAN").exception)
    assert run("show", files / "PLAN", "--cost", files / "moved.json").exit_code == 0


def test_compare(files):
    options = ["--ranks", "8", "--tiers", "1024:cp1,8192:cp8", "--step-tokens", "16384"]
    done = run("compare", "--lengths", files / "lengths.npy", *options, "--picture", files / "picture.png")
    assert done.exit_code == 0, done.output
    assert "HBP, lockstep" in done.output and (files / "picture.png").stat().st_size > 1000


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
        (lambda f: ["--lengths", f / "lengths.npy", "--store", f], ConfigError, "either --lengths"),
        (lambda f: ["--store", f / "none"], DataError, "no such token store"),
        (lambda f: ["--store", f, "--loss-tokens", f / "loss_tokens.npy"], ConfigError, "goes with --lengths"),
        (lambda f: ["--lengths", broken(f, "a.npy", np.array([2**40]))], DataError, "a plan counts up to"),
        (
            lambda f: ["--lengths", broken(f, "a.npy", np.array([2**64 - 1], np.uint64))],
            DataError,
            "more than a sample",
        ),
        (lambda f: ["--lengths", f / "lengths.npy", "--step-tokens", 10**25], ConfigError, "step tokens between"),
        (lambda f: ["--lengths", f / "lengths.npy", "--tiers", f"{10**20}:cp1"], ConfigError, "a pack holds at most"),
        (lambda f: ["--lengths", f / "lengths.npy", "--tiers", "9999:cp1:sel="], ConfigError, "at least one module"),
        (
            lambda f: ["--lengths", f / "lengths.npy", "--tiers", "9999:cp1:full99", "--cost", "llama3.1-8b-h100"],
            ConfigError,
            "more than the 32 layers",
        ),
        (lambda f: ["--lengths", f / "lengths.npy", "--out", ""], ConfigError, "is no file"),
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
    result = run(*OPTIONS, "--out", files / "PLAN", *arguments(files))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (files / "PLAN").exists()


def test_missing_options_are_named(files):
    result = run("--lengths", files / "lengths.npy", "--ranks", 4)
    assert isinstance(result.exception, HbpError)
    assert "--tiers, --step-tokens, --out" in str(result.exception)


def test_showing_what_is_no_plan(files):
    assert isinstance(run("show", files / "lengths.npy").exception, PlanError)
