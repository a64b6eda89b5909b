"""Packing and dynamic CP change no parameter after two steps of Megatron-LM's own optimizers."""

import pytest

from tests.launching import launch

BOUND = {"plain float64": 1e-10, "plain float32": 1e-5, "distributed float32": 1e-5}
LAYOUTS = ("dense tp1 ep1", "dense tp2 ep1", "moe tp1 ep1", "moe tp1 ep2", "moe tp2 ep2")


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, float]:
    return launch("tests.equivalence.optimizer", ranks=4, tmp_path=tmp_path_factory.mktemp("optimizer"))


@pytest.mark.parametrize("optimizer", BOUND)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_two_steps(errors, layout, optimizer):
    assert errors[f"{layout} {optimizer}"] < BOUND[optimizer]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_steps_move_the_parameters(errors, layout, dtype):
    assert errors[f"{layout} {dtype} moved"] > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distributed_optimizer_equals_the_plain_one(errors, layout):
    assert errors[f"{layout} distributed against plain"] < 1e-6


def test_table(errors, capsys):
    with capsys.disabled():
        print("\nlargest relative deviation of a parameter after two steps, mixed CP against one sample at a time")
        for case, error in errors.items():
            print(f"  {case:42} {error:9.1e}")
