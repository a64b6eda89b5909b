"""Gang schedules change no gradient, and ranks that would not meet are refused before the first step."""

from typing import Any

import pytest

from tests.launching import launch

EXACT, SEEN = 1e-12, 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    return launch("tests.equivalence.support.gang", ranks=4, tmp_path=tmp_path_factory.mktemp("gang"))


def test_ranks_run_unequal_numbers_of_micro_batches(found):
    assert found["counts"] == [[4, 3, 3, 2], [4, 1, 2, 2]]


@pytest.mark.parametrize("yard", ["one sample at a time", "lockstep", "one sample at a time, TP 2"])
@pytest.mark.parametrize("step", [0, 1])
def test_gradients(found, step, yard):
    assert found[f"step {step}: gang, {yard}"] < EXACT


@pytest.mark.parametrize("breakage", ["no dummy", "dummy in the loss"])
def test_an_idle_rank_brings_a_dummy_of_no_weight(found, breakage):
    assert found["idle rank: correct code"] < EXACT
    assert found[f"idle rank: {breakage}"] > SEEN


def test_ranks_that_agree_train(found):
    assert found["agreement"]["as planned"] == [""] * 4


@pytest.mark.parametrize(
    "what, words",
    [
        ("another plan", ("disagree on the plan", "rank 2 has")),
        ("another order", ("data-parallel rank 1 would come to its shared packs in another order",)),
        ("a pack left out", ("data-parallel rank 3 would come to its shared packs in another order",)),
    ],
)
def test_ranks_that_would_not_meet_are_refused_on_every_rank(found, what, words):
    messages = found["agreement"][what]
    assert len(messages) == 4 and all(word in message for message in messages for word in words), messages


def test_table(found, capsys):
    with capsys.disabled():
        print("\ngang schedule, fp64, 4 ranks, CP degrees 1, 2, 4 side by side: largest relative error of a gradient")
        for case, value in found.items():
            if isinstance(value, float):
                print(f"  {case:46} {value:9.1e}")
