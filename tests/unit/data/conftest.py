"""A real tokenizer, trained here, and `hbp` called as a user calls it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hbp.data.tokenizer import ChatTokenizer

CORPUS = ["What is the capital of France?", "The capital of France is Paris.", "Be brief.", "Thank you, bye!"] * 20

TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    byte_pairs.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_pairs, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(tokenizer_folder))


@dataclass(frozen=True)
class Result:
    """Exit code and output of one run of `hbp`."""

    code: int
    out: str
    err: str


@pytest.fixture
def hbp(monkeypatch, capsys) -> Callable[..., Result]:
    """Call `megatron_hbp.cli.main` with arguments."""
    from megatron_hbp import cli

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hbp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(code=int(exit_.value.code or 0), out=captured.out, err=captured.err)

    return run


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def line(*contents: str, system: str | None = None) -> bytes:
    """One valid line of a chat file."""
    return json.dumps({"messages": turns(*contents, system=system)}, ensure_ascii=False).encode() + b"\n"


GOOD = line("What is the capital of France?", "Paris.")
