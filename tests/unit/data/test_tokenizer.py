"""The loss mask, token by token."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.data.chats import BadChat, Chat, Fault, Record
from megatron_hbp.data.tokenizer import ChatTokenizer, Sample
from megatron_hbp.errors import ConfigError
from tests.unit.data.conftest import turns


def encode(tokenizer: ChatTokenizer, messages: Sequence[Record]) -> Sample:
    return next(tokenizer.encode([tokenizer.render(Chat(where="here:1", messages=messages))]))


def masked_text(tokenizer: ChatTokenizer, sample: Sample) -> str:
    return tokenizer.backend.decode(sample.tokens[sample.loss_mask == 1])


def pieces(tokenizer: ChatTokenizer, *texts: str) -> list[list[int]]:
    return [tokenizer.backend(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_tokens_and_mask_of_a_chat_match_those_worked_out_by_hand(tokenizer):
    sample = encode(tokenizer, turns("Hello", "Paris.", "Thank you", "bye!", system="Be brief."))
    end, begin, system, user, assistant = tokenizer.backend.convert_tokens_to_ids(
        ["<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>"]
    )
    brief, hello, paris, thanks, bye = pieces(tokenizer, "Be brief.", "Hello", "Paris.", "Thank you", "bye!")
    expected = [
        ([begin, system, *brief, end, user, *hello, end, assistant], 0),
        ([*paris, end], 1),
        ([user, *thanks, end, assistant], 0),
        ([*bye, end], 1),
    ]
    assert sample.tokens.tolist() == [token for tokens, _ in expected for token in tokens]
    assert sample.loss_mask.tolist() == [mark for tokens, mark in expected for _ in tokens]
    assert sample.tokens.dtype == np.int32 and sample.loss_mask.dtype == np.uint8


def test_masks_equal_those_of_transformers(tokenizer):
    messages = turns("What is the capital?", "Paris, naïve café.", "Thank you", "bye!", system="Be brief.")
    theirs = tokenizer.backend.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer, messages)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.loss_mask.tolist() == theirs["assistant_masks"]


def test_an_emoji_before_the_end_of_the_generated_text_keeps_all_its_tokens(tokenizer):
    """transformers 5 marks only the first of its four byte-level tokens."""
    end_outside = tokenizer.template.replace(
        " + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}"
    )
    assert end_outside != tokenizer.template
    sample = encode(replace(tokenizer, template=end_outside), turns("Hello", "Paris 🙂", "Thank you", "bye 🙂"))
    assert masked_text(tokenizer, sample) == "Paris 🙂bye 🙂"


def test_tool_turns_and_calls_carry_no_loss(tokenizer):
    messages: list[Record] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Paris."},
        {"role": "tool", "content": "France", "tool_call_id": None},
        {"role": "assistant", "content": "bye!"},
    ]
    assert masked_text(tokenizer, encode(tokenizer, messages)) == "Paris.<|end|>bye!<|end|>"


def test_a_token_that_is_generated_in_part_is_a_target(tokenizer):
    """As in transformers: the model generates the whole token."""
    joined = "{% for m in messages %}of Fran{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    sample = encode(replace(tokenizer, template=joined), [{"role": "assistant", "content": "ce"}])
    *before, across = sample.tokens.tolist()
    assert tokenizer.backend.decode([across]) == " France"
    assert sample.loss_mask.tolist() == [0] * len(before) + [1]


def test_a_null_field_counts_as_missing(tokenizer):
    names = (
        "{% for m in messages %}{% generation %}{{ m['name'] if 'name' in m else 'x' }}{% endgeneration %}{% endfor %}"
    )
    chat = Chat(where="here:1", messages=[{"role": "assistant", "content": "Paris.", "name": None}])
    assert replace(tokenizer, template=names).render(chat).text == "x"


def test_special_tokens_come_from_the_template_alone(tokenizer, tokenizer_folder):
    """Llama's tokenizer puts its begin token before any text, and so does its template."""
    from tokenizers.processors import TemplateProcessing

    adding = ChatTokenizer.load(str(tokenizer_folder))
    adding.backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    messages = turns("Hello", "Paris.")
    assert encode(adding, messages).tokens.tolist() == encode(tokenizer, messages).tokens.tolist()


def test_the_first_token_is_never_a_target(tokenizer):
    bare = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    sample = encode(replace(tokenizer, template=bare), [{"role": "assistant", "content": "Paris."}])
    assert sample.loss_mask.tolist() == [0] + [1] * (sample.tokens.size - 1)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00<|>"), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(TEXT, min_size=2, max_size=6))
def test_masked_tokens_decode_to_the_assistants_text(tokenizer, contents):
    sample = encode(tokenizer, turns(*contents))
    assert masked_text(tokenizer, sample) == "".join(f"{answer}<|end|>" for answer in contents[1::2])


def test_batches_equal_single_chats(tokenizer):
    chats = [Chat(where=f"here:{n}", messages=turns("Hello" * n, "Paris. 🙂" * n)) for n in range(1, 9)]
    batched = tokenizer.encode([tokenizer.render(chat) for chat in chats])
    for chat, sample in zip(chats, batched, strict=True):
        alone = encode(tokenizer, chat.messages)
        assert sample.where == chat.where
        assert np.array_equal(sample.tokens, alone.tokens) and np.array_equal(sample.loss_mask, alone.loss_mask)


@pytest.mark.parametrize(
    ("content", "fault"), [("a\x00b", Fault.NUL), ("a\ud800b", Fault.UTF8)], ids=["NUL", "lone surrogate"]
)
def test_text_that_json_can_escape_but_no_tokenizer_can_encode(tokenizer, content, fault):
    with pytest.raises(BadChat, match=r"^here:1: ") as bad:
        encode(tokenizer, turns("Hello", content))
    assert bad.value.fault is fault


def test_a_template_that_refuses_a_chat_names_its_line(tokenizer):
    strict = replace(
        tokenizer, template="{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(BadChat, match=r"here:1: refused by the chat template: roles must alternate"):
        encode(strict, turns("Hello", "Paris."))


def test_a_template_that_is_not_jinja(tokenizer):
    broken = replace(tokenizer, template="{% generation %}{% for %}")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        encode(broken, turns("Hello", "Paris."))


def test_a_template_without_generation_block(tokenizer_folder, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"plain\.jinja has no \{% generation %\} block.*--chat-template"):
        ChatTokenizer.load(str(tokenizer_folder), template_file=template)


def test_a_template_file_replaces_the_tokenizers_own(tokenizer, tokenizer_folder, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% endfor %}")
    loaded = ChatTokenizer.load(str(tokenizer_folder), template_file=template)
    assert tokenizer.backend.decode(encode(loaded, turns("Hello", "Paris.")).tokens) == "HelloParis."
    assert loaded.info.sha256 == tokenizer.info.sha256
    assert loaded.info.chat_template_sha256 != tokenizer.info.chat_template_sha256


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "tokenizer.json"])
def test_a_missing_tokenizer(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--tokenizer .*(no such directory|is a file)"):
        ChatTokenizer.load(name)


def test_a_damaged_tokenizer(tokenizer_folder, tmp_path):
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ChatTokenizer.load(str(tmp_path))


def test_tokenizer_info_does_not_depend_on_the_path(tokenizer, tokenizer_folder, tmp_path):
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = ChatTokenizer.load(str(tmp_path)).info
    assert replace(moved, name=tokenizer.info.name) == tokenizer.info
    assert (moved.vocab_size, moved.eos_id, moved.pad_id) == (len(tokenizer.backend), 1, 2)
