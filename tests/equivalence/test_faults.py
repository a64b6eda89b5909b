"""What is broken on purpose is seen, each breakage by a test of its own name."""

from typing import Any

import pytest

from tests.launching import launch

EXACT, SEEN = 1e-12, 1e-3
MODELS = pytest.mark.parametrize("model", ["dense", "moe"])
LOSSES = pytest.mark.parametrize("loss", ["aux_loss", "seq_aux_loss"])

RECOMPUTED = pytest.mark.parametrize(
    "model, policy",
    [
        ("dense", "full"), ("dense", "core_attn"),
        ("moe", "full"), ("moe", "core_attn"), ("moe", "moe"),
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    return launch("tests.equivalence.support.faults", ranks=4, tmp_path=tmp_path_factory.mktemp("faults"))


@MODELS
def test_positions_not_reset_are_seen_in_the_positions(found, model):
    assert found[f"{model} wrong positions, correct code"] == 0
    assert found[f"{model} wrong positions, not reset"] > 50


@MODELS
def test_positions_not_reset_are_not_seen_in_the_gradients(found, model):
    """Why the test above looks at positions: with fp32 tables only their rounding shows, with fp64 ones nothing."""
    assert found[f"{model} gradients, positions not reset, fp32 rotary tables"] < 1e-6
    assert found[f"{model} gradients, positions not reset, fp64 rotary tables"] < EXACT


@MODELS
@pytest.mark.parametrize(
    "breakage", ["no mask", "boundary off by one", "wrong head order", "mean of means", "label of the next sample"]
)
def test_attention_and_loss(found, model, breakage):
    assert found[f"{model} tp2 correct code"] < EXACT
    assert found[f"{model} tp2 {breakage}"] > SEEN


@LOSSES
@pytest.mark.parametrize("breakage", ["static_group", "no_group", "padding_counted"])
def test_balance_losses_over_the_wrong_tokens(found, loss, breakage):
    assert found[f"{loss} correct code"] < EXACT
    assert found[f"{loss} {breakage}"] > SEEN


@RECOMPUTED
def test_recompute_that_reads_the_current_micro_batch(found, model, policy):
    assert found[f"pp2 {model} {policy}, captured"] == 0.0
    assert found[f"pp2 {model} {policy}, correct code"] < EXACT
    assert found[f"pp2 {model} none, reads the current"] == 0.0  # the breakage is one of recompute only
    assert found[f"pp2 {model} {policy}, reads the current"] > SEEN


def test_latent_projections_read_no_micro_batch(found):
    """Their rotary table is made outside of what is recomputed: nothing to capture, nothing to break."""
    assert found["pp2 moe mla_up_proj, captured"] == found["pp2 moe mla_up_proj, reads the current"] == 0.0


@pytest.mark.parametrize("policy", ["none", "full", "core_attn", "mla_up_proj", "moe"])
def test_static_group_of_the_balance_loss_over_stages(found, policy):
    assert found[f"pp2 moe {policy}, correct code"] < EXACT
    assert found[f"pp2 moe {policy}, static group"] > SEEN


def test_recompute_without_its_context_fails(found):
    assert "no micro-batch is bound" in found["recompute without a context"]


def test_table(found, capsys):
    with capsys.disabled():
        print("\nbroken on purpose: relative error of a gradient (fp64), tokens with a wrong position, or the refusal")
        for case, value in found.items():
            print(f"  {case:62} {value if isinstance(value, str | int) else format(value, '9.1e')}")
