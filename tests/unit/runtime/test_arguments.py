"""What Megatron-LM does not take ends in one line."""

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.runtime import arguments
from megatron_hbp.training.options import add_hbp_arguments


def parsed(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_hbp.py"])
    monkeypatch.setattr(arguments, "platform_flags", list)
    arguments.parse(argv, implied=[], add_arguments=add_hbp_arguments, subject="--hbp-plan", tables=())


def test_an_unknown_flag(monkeypatch):
    with pytest.raises(ConfigError, match=r"^unrecognized arguments: --num-layrs; see --help$"):
        parsed(monkeypatch, "--num-layrs")


def test_flags_that_contradict_each_other(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=r"^Megatron-LM refuses these flags: .*max_position_embeddings .*seq_length"):
        parsed(
            monkeypatch, "--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1",
            "--micro-batch-size", "1", "--seq-length", "9", "--max-position-embeddings", "8",
        )  # fmt: skip


def test_an_assertion_that_says_nothing_shows_itself():
    fp16 = bf16 = True
    try:
        assert not (fp16 and bf16)
    except AssertionError as error:
        assert str(arguments.refused_by_megatron(AssertionError("a\n  b"), "x")) == "Megatron-LM refuses x: a b"
        bare = AssertionError().with_traceback(error.__traceback__)
    assert "assert not (fp16 and bf16)" in str(arguments.refused_by_megatron(bare, "these flags"))
