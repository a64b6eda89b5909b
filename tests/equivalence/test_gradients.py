"""Packing, dynamic CP and recompute change no gradient: fp64, against one sample at a time."""

import pytest

from tests.launching import launch

EXACT = 1e-12


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, float]:
    """One launch of 4 ranks runs every case (tests/equivalence/support/worker.py)."""
    return launch("tests.equivalence.support.worker", ranks=4, tmp_path=tmp_path_factory.mktemp("equivalence"))


@pytest.mark.parametrize("recompute", ["none", "mixed"])
@pytest.mark.parametrize("model", ["dense ep1", "moe ep1", "moe ep2", "moe ep4"])
def test_mixed_cp_degrees_equal_one_sample_at_a_time(errors, model, recompute):
    assert errors[f"{model} recompute={recompute}"] < EXACT


@pytest.mark.parametrize(
    "breakage",
    ["no mask", "boundary off by one", "wrong head order", "mean of means", "label of the next sample"],
)
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_what_is_broken_on_purpose_is_seen(errors, model, breakage):
    assert errors[f"{model} broken: {breakage}"] > 1e-3


def test_table(errors, capsys):
    """Print the table of covered cases."""
    with capsys.disabled():
        print("\nlargest relative error of a gradient, fp64, 4 ranks, CP degrees 1, 2, 4 in one step")
        for case, error in errors.items():
            print(f"  {case:42} {error:9.1e}")
