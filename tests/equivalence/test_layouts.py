"""Dynamic CP changes no gradient under tensor, pipeline and expert parallelism, nor do balance losses depend on it."""

from typing import Any

import pytest

from tests.launching import launch

EXACT = 1e-12


def check(errors: dict[str, float], capsys: Any, title: str) -> None:
    """Every case exact; print the table; balance losses must also have an effect."""
    with capsys.disabled():
        print(f"\nlargest relative error of a gradient, fp64, {title}")
        for case, error in errors.items():
            print(f"  {case:62} {error:9.1e}")
    matters = {case: error for case, error in errors.items() if case.endswith("matters")}
    exact = {case: error for case, error in errors.items() if case not in matters}
    assert exact and max(exact.values()) < EXACT, max(exact, key=exact.__getitem__)
    assert all(error > 1e-3 for error in matters.values()), matters


def test_four_ranks(tmp_path, capsys):
    errors = launch("tests.equivalence.layouts", "four", ranks=4, tmp_path=tmp_path)
    assert any("aux_loss" in case for case in errors)
    check(errors, capsys, "4 ranks")


@pytest.mark.slow
@pytest.mark.parametrize("which, ranks", [("six", 6), ("eight", 8)])
def test_more_ranks(tmp_path, capsys, which, ranks):
    errors = launch("tests.equivalence.layouts", which, ranks=ranks, tmp_path=tmp_path, timeout=1800)
    check(errors, capsys, f"{ranks} ranks")
