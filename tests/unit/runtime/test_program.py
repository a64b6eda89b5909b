"""What Megatron-LM does not take ends in one line; ranks end together, or each by itself."""

import pytest

from megatron_hbp.errors import ConfigError, everywhere
from megatron_hbp.runtime import program
from megatron_hbp.runtime.options import add_hbp_arguments


def parsed(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_hbp.py"])
    monkeypatch.setattr(program, "platform_flags", list)
    program.parse(argv, add_hbp_arguments)


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
        assert str(program.refused_by_megatron(AssertionError("a\n  b"), "x")) == "Megatron-LM refuses x: a b"
        bare = AssertionError().with_traceback(error.__traceback__)
    assert "assert not (fp16 and bf16)" in str(program.refused_by_megatron(bare, "these flags"))


@pytest.mark.parametrize(
    "rank, has_groups, is_everywhere, waits, message",
    [
        ("0", False, False, 0, "hbp: broken\n"),
        ("3", False, False, 1, "hbp: [rank 3] broken\n"),  # rank 0 had no error, else it had ended this one
        ("3", True, True, 1, "hbp: [rank 3] broken\n"),
        ("0", True, True, 0, "hbp: broken\n"),
        ("3", True, False, 0, "hbp: [rank 3] broken\n"),  # an error of this rank alone
    ],
)
def test_who_speaks(monkeypatch, tmp_path, capsys, rank, has_groups, is_everywhere, waits, message):
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("HBP_EXIT_CODE_FILE", str(tmp_path / "code"))
    monkeypatch.setattr(program.time, "sleep", slept.append)
    monkeypatch.setattr(program.dist, "is_initialized", lambda: has_groups)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(program.os, "_exit", leave)
    error = everywhere(ConfigError("broken")) if is_everywhere else ConfigError("broken")
    with pytest.raises(SystemExit) as left:
        program.fail(error, "hbp")
    assert left.value.code == 78 and (tmp_path / "code").read_text() == "78\n"
    assert slept == [program.PATIENCE] * waits and capsys.readouterr().err == message
