"""Which rows a profile runs, in which order."""

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.profiling.grid import parse_numbers, parse_policies, settings

POLICIES = parse_policies("none,full2,full4,sel=core_attn", 4)
GRID = settings((1024, 4096, 16384, 65536), (1, 2, 4, 8), POLICIES, unit=1)


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
