"""Dynamic CP, recompute and packing change nothing, in every pair of circumstances; `coverage.md` is the table."""

import functools
from typing import Any

import pytest

from tests.equivalence.support import coverage
from tests.equivalence.support.factors import NOT_TOGETHER, Case, all_pairs, pairs_of, pairwise_cases

GRADIENTS = 1e-12
PARAMETERS = {"plain": 1e-10, "distributed": 1e-5}
CASES = [
    pytest.param(each, case, id=str(case), marks=[] if each == coverage.LAUNCHES[0] else pytest.mark.slow)
    for each in coverage.LAUNCHES
    for case in each.cases()
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Any:
    """Launch -> results; it happens when the first of its cases is asked for."""
    return functools.cache(lambda each: each.run(tmp_path_factory.mktemp(f"ranks{each.ranks}")))


@pytest.mark.parametrize("launch, case", CASES)
def test_case(launched, capsys, launch: coverage.Launch, case: Case):
    found = launched(launch)[str(case)]
    if case == launch.cases()[0]:
        with capsys.disabled():
            print("", *coverage.header(), *coverage.lines_of(launch, launched(launch)), sep="\n")
    assert found["moved"] > 1e-2  # else two steps would show nothing
    assert found["parameters"] < PARAMETERS[case.optimizer]
    if case.optimizer == "plain":
        assert found["gradients"] < GRADIENTS
    if case.recompute != "none":
        assert found["changed by recompute"] == 0
        assert found["saved bytes"] < 1


def test_balance_losses_equal_those_at_cp1(launched, capsys):
    errors = launched(coverage.LAUNCHES[0])["balance"]
    with capsys.disabled():
        print("", *(f"  {case:46} {error:9.1e}" for case, error in errors.items()), sep="\n")
    assert len(errors) == 36
    for case, error in errors.items():
        assert error > 1e-3 if case.endswith("matters") else error < GRADIENTS, case


def test_every_possible_pair_is_covered():
    covered = set().union(*map(pairs_of, pairwise_cases()))
    assert not all_pairs() - NOT_TOGETHER.keys() - covered


def test_what_cannot_be_together_is_not_run():
    for launch in coverage.LAUNCHES:
        for case in launch.cases():
            assert case.fits() and not pairs_of(case) & NOT_TOGETHER.keys(), case
    assert NOT_TOGETHER.keys() <= all_pairs()


def test_the_committed_table_lists_these_cases():
    listed = coverage.listed(coverage.COVERAGE.read_text())
    assert sorted(listed) == sorted(coverage.expected()), "run `make coverage-table`"
