"""Context-parallel groups on 4 gloo ranks, one launch: who is in which, what is shared, how long they wait."""

from typing import Any

import pytest

from tests.launching import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return launch("tests.unit.parallel.worker", ranks=4, tmp_path=tmp_path_factory.mktemp("groups"))


def test_gangs_are_aligned_and_consecutive(ranks):
    for rank, found in enumerate(ranks):
        first = rank - rank % 2
        assert found["dp4"]["members"] == {"2": [first, first + 1], "4": [0, 1, 2, 3]}


@pytest.mark.parametrize("layout", ["dp4", "tp2", "pp2"])
def test_gangs_lie_inside_the_data_parallel_group(ranks, layout):
    for rank, found in enumerate(ranks):
        data_parallel = found[layout]["data_parallel"]
        for degree, members in found[layout]["members"].items():
            start = data_parallel.index(rank) // int(degree) * int(degree)
            assert members == data_parallel[start : start + int(degree)]
            assert found[layout]["sums"][degree] == sum(2.0**member for member in members)  # it communicates


def test_a_group_equal_to_the_data_parallel_group_is_shared(ranks):
    for found in ranks:
        assert found["dp4"]["shared"] == {"2": False, "4": True}
        assert found["dp4"]["num_created"] == 1
        for layout in ("tp2", "pp2"):
            assert found[layout]["shared"] == {"2": True}
            assert found[layout]["num_created"] == 0 and found[layout]["calls"] == []


def test_degree_one_has_no_group(ranks):
    assert all(found[layout]["degree 1"] is None for found in ranks for layout in ("dp4", "tp2", "pp2"))


def test_every_rank_calls_new_group_in_the_same_order(ranks):
    assert [found["dp4"]["calls"] for found in ranks] == [[[0, 1], [2, 3]]] * 4


def test_the_timeout_is_the_one_given(ranks):
    """`new_group` does not inherit the world's timeout (300 s here)."""
    assert [found["dp4"]["timeouts"] for found in ranks] == [{"2": 97.0}] * 4


@pytest.mark.parametrize("layout, size", [("dp4", 4), ("tp2", 2), ("pp2", 2)])
def test_a_degree_that_does_not_divide_is_refused(ranks, layout, size):
    for found in ranks:
        assert set(found[layout]["refused"]) == {"3", "8"}
        for degree, message in found[layout]["refused"].items():
            assert f"CP degree {degree}" in message and f"{size} data-parallel ranks" in message


def test_no_group_is_made_after_start_up(ranks):
    assert [found["steps"] for found in ranks] == [{"calls": 0, "known": 0}] * 4
