"""What is asked of a planner is checked once, before anything is planned."""

from typing import Any

import numpy as np
import pytest

from megatron_hbp.errors import ConfigError, DataError
from megatron_hbp.planning import Request, Samples, parse_tiers
from megatron_hbp.planning.request import MAX_RANKS, check_ranks, occurrences

TIERS = parse_tiers("1024:cp1,8192:cp4")


def request_of(**options):
    defaults: dict[str, Any] = {"tiers": TIERS, "num_ranks": 4, "step_tokens": 16384}
    return Request(**defaults | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 6}, "6 ranks do not divide into gangs of 4"),
        ({"num_ranks": 0}, "ranks must be between 1 and 131072, got 0"),
        ({"num_ranks": 10**18}, "ranks must be between 1 and"),
        ({"schedule": "chaos"}, "unknown schedule 'chaos'"),
        ({"step_tokens": 0}, "step tokens must be between 1"),
        ({"step_tokens": 2**53 + 1}, "step tokens must be between 1"),
        ({"curriculum_steps": -1}, "curriculum steps must be at least 0"),
        ({"slot_multiple": 0}, "slot multiple must be between 1 and 1024, got 0"),
        ({"slot_multiple": 10**9}, "slot multiple must be between 1 and 1024"),
        ({"schedule": "gang", "packing": "ISF"}, "packing 'ISF' requires --schedule lockstep"),
        ({"tiers": TIERS[::-1]}, "tiers must grow"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        request_of(**options)


def test_ranks_without_tiers_and_the_largest_number_of_them():
    check_ranks((), MAX_RANKS)
    with pytest.raises(ConfigError, match="a pack holds at most 2147483647 tokens"):
        check_ranks(parse_tiers(f"{10**12}:cp1"), 4)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([100, 9000, 200, 10000], {}, r"2 samples are longer .* the first is sample 1 with 9000"),
        ([100, 9000], {"longest": 99, "tiers": parse_tiers("16384:cp1")}, r"2 samples are longer"),
        ([9000], {"overlong": "drop"}, "nothing is left"),
    ],
)
def test_samples_that_cannot_be_planned(lengths, options, message):
    with pytest.raises(DataError, match=message):
        occurrences(Samples.of(np.array(lengths)), request_of(**options))


def test_occurrences_are_counted_cut_and_keep_their_share_of_loss_tokens():
    samples = Samples.of(np.array([10, 4000, 9000]), np.array([5, 1000, 9000]), np.array([2, 1, 3]))
    found = occurrences(samples, request_of(overlong="truncate", longest=3000))
    assert found.ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.lengths.tolist() == [10, 10, 3000, 3000, 3000, 3000]
    assert found.loss_tokens is not None
    assert found.loss_tokens.tolist() == [5, 5, 750, 3000, 3000, 3000]
    assert found.counts == {"dropped": 0, "truncated": 4, "dropped_tokens": 1000 + 3 * 6000}
    dropped = occurrences(samples, request_of(overlong="drop"))
    assert dropped.ids.tolist() == [0, 0, 1] and dropped.counts["dropped_tokens"] == 27000


def test_the_limit_is_the_longest_tier_or_less():
    assert request_of().limit == 8192
    assert request_of(longest=500).limit == 500
    assert request_of(tiers=()).limit == 2**31 - 1
