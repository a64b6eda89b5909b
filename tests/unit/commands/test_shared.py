"""Options that several sub-commands read."""

import pytest

from megatron_hbp.commands.shared import parse_memory
from megatron_hbp.errors import ConfigError


@pytest.mark.parametrize("text", ["", "4096", "4096:x", "0:3", "4096:1,"])
def test_a_memory_table_that_is_none(text):
    with pytest.raises(ConfigError, match="LOCAL_TOKENS:LAYERS"):
        parse_memory(text)


def test_a_memory_table_is_sorted():
    assert parse_memory("16384:28, 2048:0,4096:8") == ((2048, 0), (4096, 8), (16384, 28))
    assert parse_memory(None) == ()
