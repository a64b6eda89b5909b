"""Exchanging MLA's latents changes no gradient: fp64, against one sample at a time, and TP 2 against TP 1."""

import pytest

from tests.launching import launch

EXACT = 1e-12
LATENT = ["qkv_latent", "kv_latent"]
FIRST = "cp2 qkv_latent, cp4 kv_latent recompute="
POLICIES = [f"{FIRST}{name}" for name in ("none", "mla_up_proj", "core_attn", "mla_up_proj+core_attn", "full")]
POLICIES += ["cp2 kv_latent, cp4 qkv_latent recompute=mla_up_proj"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """One launch of 4 ranks runs every case (tests/equivalence/support/latents.py)."""
    return launch("tests.equivalence.support.latents", ranks=4, tmp_path=tmp_path_factory.mktemp("latents"))


@pytest.mark.parametrize("case", POLICIES)
def test_latents_equal_one_sample_at_a_time(figures, case):
    assert figures[case] < EXACT


@pytest.mark.parametrize("start", ["cp2 ", "ep2", "q_lora_rank=None", "tp2 qkv", "tp2 kv", "local samples"])
def test_mixed_exchanges_and_layouts(figures, start):
    found = {case: error for case, error in figures.items() if case.startswith(start)}
    assert found and max(found.values()) < EXACT, found


@pytest.mark.parametrize("case", POLICIES)
def test_a_micro_batch_runs_the_hook_of_a_weight_once(figures, case):
    """Overlapped gradient reduction counts the calls of a step's last micro-batch, whose exchange may be any."""
    assert figures[f"hooks {case}"] == [5, 5]


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("exchange", LATENT)
def test_bytes_are_those_that_planning_counts(figures, exchange, degree):
    received, planned = figures[f"bytes {exchange} cp{degree}"]
    assert received == planned > 0


@pytest.mark.parametrize(
    "breakage",
    [
        "local positions of gathered queries",
        "heads of another rank",
        "gradient of a slice in the wrong rows",
        "a step of the ring left out",
    ],
)
def test_what_is_broken_on_purpose_is_seen(figures, breakage):
    assert figures[f"broken: {breakage}"] > 1e-3


@pytest.mark.parametrize("mode", ["with", "without"])
@pytest.mark.parametrize("case", ["a2a", "p2p", *LATENT, "chunked loss"])
def test_tensor_parallelism_changes_no_gradient(figures, mode, case):
    assert figures[f"tp2 against tp1, {mode} sequence parallelism, {case}"] < EXACT


@pytest.mark.parametrize("mode", ["with", "without"])
def test_megatron_lm_loses_gradient_of_the_rotary_key(figures, mode):
    """The day this fails, Megatron-LM has mended it, and model/mla.py can go back to its down-projection."""
    assert figures[f"tp2 against tp1, {mode} sequence parallelism, Megatron-LM's"] > 1e-3


def test_distributed_optimizer(figures):
    assert figures["fp32 distributed optimizer"] < 1e-5


def test_table(figures, capsys):
    with capsys.disabled():
        print("\nMLA's latents exchanged: largest relative error of a gradient, fp64, 4 ranks")
        for case, figure in figures.items():
            if isinstance(figure, float):
                print(f"  {case:78} {figure:9.1e}")
