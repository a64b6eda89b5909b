"""The fit of a profile: planted constants come back, nothing is negative; memory on lines through two readings."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_hbp.cli import app
from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.cost import file as cost_file
from megatron_hbp.planning.cost.fit import fit_profile, nonnegative_least_squares, spearman
from megatron_hbp.planning.cost.model import preset
from megatron_hbp.planning.cost.profile_memory import (
    layers_by_local_tokens,
    layers_that_fit,
    peak_of,
    predict,
    with_limit,
)
from megatron_hbp.planning.cost.profile_table import Setting
from megatron_hbp.profiling.grid import parse_numbers, parse_policies, settings
from megatron_hbp.profiling.options import ProfileOptions
from tests.unit.planning.profiles import HEADER, PLANTED, row_of, table_of

POLICIES = parse_policies("none,full2,full4,sel=core_attn", 4)
GRID = settings((1024, 4096, 16384, 65536), (1, 2, 4, 8), POLICIES, unit=1)


def test_planted_constants_come_back_exactly():
    found = fit_profile(table_of([row_of(s) for s in GRID]), name="x").cost
    for name in ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth", "micro_batch_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=1e-6), name
    shares = {name: shares for name, *shares in found.recompute_shares}
    assert shares["full"] == pytest.approx([0.9, 0.95], rel=1e-6)
    assert shares["core_attn"] == pytest.approx([0.0, 1.1], abs=1e-6)
    assert dict(found.recompute_seconds) == pytest.approx(dict(PLANTED.recompute_seconds), rel=1e-6)
    assert found.tier_cost(parse_tiers("1024:cp1:full2")[0]).fixed == pytest.approx(0.02 + 0.008 / 2)


def test_with_noise_the_rows_held_out_are_predicted_within_it():
    rows = [row_of(setting, noise=0.05, seed=i) for i, setting in enumerate(GRID)]
    fit = fit_profile(table_of(rows), name="x")
    fitted, held_out = (np.median(fit.absolute_errors(held_out=held_out)) for held_out in (False, True))
    assert fitted < held_out < 0.06
    assert fit.cost.linear_rate == pytest.approx(PLANTED.linear_rate, rel=0.2)
    for tier in parse_tiers("8192:cp1,32768:cp4:full3"):  # neither length nor policy was in the table
        tokens = tier.packing_length
        wanted = PLANTED.tier_cost(tier).seconds(tokens, tokens**2)
        assert fit.cost.tier_cost(tier).seconds(tokens, tokens**2) == pytest.approx(wanted, rel=0.06)


def test_every_row_enters_the_fit_and_none_its_own_held_out_error():
    rows = [row_of(setting, noise=0.05, seed=i) for i, setting in enumerate(GRID)]
    before = {one.row.setting: one for one in fit_profile(table_of(rows), name="x").errors}
    for i, row in enumerate(rows):
        slower = replace(row, seconds=row.seconds * (1 + 1e-6))
        fit = fit_profile(table_of([*rows[:i], slower, *rows[i + 1 :]]), name="x")
        (after,) = (one for one in fit.errors if one.row.setting == row.setting)
        assert after.predicted > before[row.setting].predicted
        assert after.unseen == before[row.setting].unseen


def test_no_coefficient_is_negative():
    rows = [replace(row_of(s), seconds=1.0 / s.tokens) for s in GRID]  # the longer, the faster
    cost = fit_profile(table_of(rows), name="x").cost
    for tier in parse_tiers("1024:cp1,4096:cp2:full4,8192:cp4:sel=core_attn"):
        one = cost.tier_cost(tier)
        assert min(one.fixed, one.per_token, one.per_square) >= 0


def test_least_squares_against_all_sets_of_free_columns():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = random.standard_normal((8, 4)), random.standard_normal(8)
        found = nonnegative_least_squares(a, b)
        best = np.inf
        for mask in range(16):
            free = [i for i in range(4) if mask >> i & 1]
            x = np.zeros(4)
            if free:
                x[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(a @ x - b)))
        assert (found >= 0).all() and np.linalg.norm(a @ found - b) == pytest.approx(best)


@pytest.mark.parametrize(
    "field, value",
    [
        ("linear_rate", -1.0), ("linear_rate", 0), ("num_layers", 0), ("num_layers", "x"), ("linear_flops", -1),
        ("attention_flops", []), ("step_seconds", None), ("step_seconds", float("nan")), ("tensor_parallel", 0),
        ("node_size", -1), ("max_cp_degree", "8"), ("recompute_layers", [[1024]]), ("recompute_layers", [[1024, 1.5]]),
        ("recompute_shares", [["full", 1]]), ("recompute_seconds", [["full", -1]]), ("recompute_seconds", [["full"]]),
        ("group_seconds", [[4, float("nan")]]), ("group_seconds", [[4, -99]]),
        ("attention", {"num_query_heads": "x", "num_kv_heads": 1, "qk_width": 1, "v_width": 1}), ("attention", {}),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(tmp_path, field, value):
    path = tmp_path / "c.json"
    cost_file.save(PLANTED, path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"cost": values["cost"] | {field: value}}))
    with pytest.raises(ConfigError, match=r"is damaged .*(linear|num|attention|step|tensor|node|max|recompute|group)_"):
        cost_file.load(path)


def test_too_few_rows_are_refused_and_rows_that_do_not_fit_do_not_count():
    rows = [row_of(s) for s in GRID[:4]]
    rows += [replace(row_of(s), fits=False, seconds=None) for s in GRID[4:]]
    with pytest.raises(DataError, match=r"cannot determine \d+ constants: profile more lengths"):
        fit_profile(table_of(rows), name="x")


def test_rank_correlation():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 25, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(0.8660254)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


# ---------------------------------------------------------------- the file that `hbp plan --cost` reads


def test_a_cost_model_goes_to_a_file_and_back(tmp_path):
    path = tmp_path / "c.json"
    cost = replace(PLANTED, name=str(path), cluster_bandwidth=float("inf"), group_seconds=((2, 0.1),))
    cost_file.save(cost, path)
    assert cost_file.cost_model(str(path)) == cost
    assert cost_file.cost_model("llama3.1-8b-h100") == preset("llama3.1-8b-h100")
    (tier,) = parse_tiers("1024:cp2")
    assert cost.tier_cost(tier).fixed == pytest.approx(0.12)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda v: v | {"cost": {}}, "is damaged"),
        (lambda v: v | {"version": 1}, "version 1"),
        (lambda v: v | {"kind": "hbp profile table"}, "is not a cost model"),
    ],
    ids=["empty", "version", "kind"],
)
def test_a_bad_cost_file_says_why(tmp_path, change, says):
    path = tmp_path / "c.json"
    cost_file.save(PLANTED, path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=says):
        cost_file.cost_model(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        cost_file.cost_model(str(tmp_path / "absent.json"))


# ---------------------------------------------------------------- memory


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


@pytest.mark.parametrize("exchange", ["a2a", "all_gather", "p2p"])
def test_a_profile_is_fitted_by_the_exchange_that_ran(exchange):
    rows = []
    for setting in GRID:
        tier = replace(setting.tier, exchange=exchange)
        seconds = float(PLANTED.tier_cost(tier).seconds(setting.tokens, setting.squares))
        rows.append(replace(row_of(setting), seconds=seconds))
    table = replace(table_of(rows), header=replace(HEADER, exchange=exchange))
    assert max(abs(each.error) for each in fit_profile(table, name="x").errors) < 1e-9


def test_the_cost_model_knows_what_must_be_recomputed():
    table = table_of([row_of(s) for s in GRID if s.cp_degree == 1], limit=4096 * 500.0)
    assert layers_by_local_tokens(table) == ((1024, 0), (4096, 3))
    cost = fit_profile(table, name="x").cost
    assert cost.with_recompute(parse_tiers("4096:cp1")[0]).recompute.num_layers == 3
    assert layers_by_local_tokens(replace(table, memory_limit=None)) == ()


def test_what_cannot_fit_is_seen_coming():
    rows = [row_of(Setting(tokens=n, cp_degree=1, recompute="none")) for n in (1024, 2048)]
    longer = Setting(tokens=8192, cp_degree=1, recompute="none")

    def refused(limit: float, setting: Setting = longer, count: int = 2) -> str:
        return predict(table_of(rows[:count], limit=limit), setting).refused

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
            predict(table_of([failed]), Setting(tokens=tokens, cp_degree=cp_degree, recompute=recompute)).refused
        )

    assert refused(8192, "full2") and refused(4096, "none") and refused(4096, "full1")
    assert not (refused(2048, "none") or refused(4096, "full3") or refused(4096, "sel=mlp") or refused(8192, "none", 2))


# ---------------------------------------------------------------- which rows


def test_rows_come_by_memory_and_every_full_pack_is_there():
    assert [s.local_tokens for s in GRID] == sorted(s.local_tokens for s in GRID)
    full = {(s.tokens, s.cp_degree, s.recompute) for s in GRID if s.shape == "one"}
    assert len(full) == 4 * 4 * 4
    assert {s.shape for s in GRID if s.recompute == "none"} == {"one", "many"}
    assert {s.shape for s in GRID if s.recompute == "full2"} == {"one"}
    first = [s.recompute for s in GRID if s.tokens == 1024 and s.cp_degree == 1 and s.shape == "one"]
    assert first == ["full4", "full2", "sel=core_attn", "none"]


def test_lengths_that_do_not_divide_are_left_out_and_nothing_left_is_refused():
    assert {s.cp_degree for s in settings((1000,), (1, 4, 8), POLICIES, unit=1)} == {1, 4}
    assert {s.local_tokens for s in settings((1024, 4096), (1, 4), POLICIES, unit=1, most_local=1024)} == {256, 1024}
    with pytest.raises(ConfigError, match="--hbp-profile-lengths 1001"):
        settings((1001,), (2,), POLICIES, unit=1)


def test_flags_that_cannot_be_read():
    assert parse_numbers("8192, 4096,4096", "--x") == (4096, 8192)
    assert [str(p) for p in parse_policies(None, 5)] == ["none", "full3", "full5"]
    for text in ("", "4k", "0", "-1", "4096,"):
        with pytest.raises(ConfigError, match="--x"):
            parse_numbers(text, "--x")
    for text in ("half", "full9", "zigzag", "cp2", "full2:align4", ""):
        with pytest.raises(ConfigError, match="--hbp-profile-recompute"):
            parse_policies(text, 4)


# ---------------------------------------------------------------- the commands


def test_a_plan_is_made_and_shown_with_a_fitted_cost_model(tmp_path):
    path, plan = tmp_path / "c.json", tmp_path / "p.plan"
    cost_file.save(PLANTED, path)
    np.save(tmp_path / "l.npy", np.arange(1, 200))
    runner = CliRunner()
    made = runner.invoke(app, ["plan", "--lengths", str(tmp_path / "l.npy"), "--ranks", "4", "--tiers", "256:cp1",
                               "--step-tokens", "2048", "--cost", str(path), "--out", str(plan)])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert planfile.load(plan).cost_model == str(path)
    assert runner.invoke(app, ["plan", "show", str(plan)]).exit_code == 0
    path.unlink()
    gone = runner.invoke(app, ["plan", "show", str(plan)])
    assert isinstance(gone.exception, ConfigError) and "cannot be read" in str(gone.exception)


def test_flags_of_training_and_shares_out_of_range_are_refused():
    for argv, says in (
        (["--hbp-plan", "x"], "--hbp-plan is for training"),
        (["--hbp-profile-supervised", "0"], "--hbp-profile-supervised"),
        (["--hbp-profile-seconds", "0"], "must be above 0"),
        (["--hbp-profile-seconds", "soon"], "invalid float"),
        (["--hbp-profile-lengths", "4k"], "--hbp-profile-lengths"),
    ):
        with pytest.raises(ConfigError, match=says):
            ProfileOptions.from_argv(argv)
    options = ProfileOptions.from_argv(["--hbp-profile-out", "a/b.json", "--num-layers", "3"])
    assert str(options.cost_file) == "a/b.cost.json" and options.degrees(12) == (1, 2, 4)
    with pytest.raises(ConfigError, match="--hbp-profile-cp 3 does not divide the 4"):
        ProfileOptions.from_argv(["--hbp-profile-cp", "3"]).degrees(4)
