"""Real text for the demo, from installed packages: nothing is downloaded or vendored.

Short samples: human-human conversations of the `chitchat-dataset` package (MIT licence; Myers, Etchart and Fulda,
"Conversational Scaffolding: An Analogy-Based Approach to Response Prioritization in Open-Domain Dialogs", 2020). The
second speaker plays the assistant.

Long samples: documents derived from CPython sources (PSF licence), the running interpreter's own standard library. The
user asks for a module, the assistant answers with its source, cut after the last whole line that keeps the sample
within `max_sample_tokens` (8192).

The corpus therefore depends only on the interpreter's version and on the seed.
"""

import json
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hbp.data.chats import Chat
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
TOKENIZER_FOLDER = "tokenizer"

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

CONVERSATION_CHARACTERS = range(200, 4_000)
"""Conversations of other lengths are left out; these have about 50 to 1,000 tokens."""
MIN_DOCUMENT_CHARACTERS = 4_000
"""About 1,000 tokens."""
CHARACTERS_PER_TOKEN = 4
"""Above the 3.3 of the demo's tokenizer on source code, so that the token limit decides where documents are cut."""
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """How much text of each kind to take, in characters (about 3.5 per token)."""

    conversations: int
    documents: int


TRAIN_SIZE = CorpusSize(conversations=1_000_000, documents=600_000)
HELDOUT_SIZE = CorpusSize(conversations=40_000, documents=32_000)


@dataclass(frozen=True, kw_only=True)
class Text:
    """One sample before tokenisation."""

    origin: str
    """The source of the text; written next to the messages."""
    messages: list[dict[str, str]]
    is_document: bool
    is_cut: bool = False
    """Only the beginning of the document is included."""

    @property
    def num_characters(self) -> int:
        """Number of characters in all messages."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Contents of one split; tokens include those of the chat template."""

    path: Path
    num_conversations: int
    num_documents: int
    num_documents_cut: int
    """Documents of which only the beginning is included."""
    conversation_tokens: int
    document_tokens: int
    longest: int
    """Number of tokens in the longest sample."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of both kinds."""
        return self.conversation_tokens + self.document_tokens


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What `build_corpus` wrote."""

    tokenizer: Path
    vocab_size: int
    train: SplitSummary
    heldout: SplitSummary


def build_corpus(
    out_dir: Path,
    *,
    seed: int = 0,
    train: CorpusSize = TRAIN_SIZE,
    heldout: CorpusSize = HELDOUT_SIZE,
    vocab_size: int = 4096,
    max_sample_tokens: int = 8192,
) -> CorpusSummary:
    """Write `train.jsonl`, `heldout.jsonl` and `tokenizer/` into `out_dir`; the same seed gives the same bytes.

    The splits share no conversation and no document, and the tokenizer is trained on the training split only. Raises
    ConfigError without the `chitchat-dataset` package or when there is less text than the sizes request, DiskError when
    a file cannot be written.
    """
    rng = random.Random(seed)
    conversations = _shuffled(_conversations(), rng)
    documents = _shuffled(_documents(max_characters=CHARACTERS_PER_TOKEN * max_sample_tokens), rng)
    heldout_texts = [*_take(conversations, heldout.conversations), *_take(documents, heldout.documents)]
    train_texts = [*_take(conversations, train.conversations), *_take(documents, train.documents)]
    folder = out_dir / TOKENIZER_FOLDER
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _train_tokenizer(train_texts, vocab_size).save_pretrained(folder)
        tokenizer = ChatTokenizer.load(str(folder))
        splits = {}
        for file, texts in ((TRAIN_FILE, train_texts), (HELDOUT_FILE, heldout_texts)):
            fitting = [_fit(text, tokenizer, max_sample_tokens) for text in _shuffled(texts, rng)]
            splits[file] = _write_split(out_dir / file, fitting, tokenizer)
    except OSError as error:
        raise DiskError(f"{out_dir}: cannot be written: {error.strerror or error}") from error
    return CorpusSummary(
        tokenizer=folder,
        vocab_size=tokenizer.info.vocab_size,
        train=splits[TRAIN_FILE],
        heldout=splits[HELDOUT_FILE],
    )


def _conversations() -> Iterator[Text]:
    """Two-speaker conversations that end with the second speaker, who plays the assistant; without duplicates."""
    try:
        from chitchat_dataset import Dataset
    except ImportError as error:
        raise ConfigError(
            "the demo requires the package chitchat-dataset; install it with `pip install chitchat-dataset`"
        ) from error
    seen = set()
    for key, conversation in Dataset().items():
        turns = _turns(conversation["messages"])
        if len(turns) % 2:
            turns.pop()
        text = Text(
            origin=f"chitchat-dataset {key}",
            messages=[
                {"role": role, "content": turn}
                for role, turn in zip(("user", "assistant") * (len(turns) // 2), turns, strict=True)
            ],
            is_document=False,
        )
        content = tuple(turns)
        if text.num_characters in CONVERSATION_CHARACTERS and content not in seen:
            seen.add(content)
            yield text


def _turns(groups: Iterable[Sequence[dict[str, str]]]) -> list[str]:
    """Join consecutive messages of one speaker with newlines; the list alternates between the two speakers."""
    turns: list[str] = []
    last_sender = None
    for message in (message for group in groups for message in group):
        text = message["text"].strip()
        if text and message["sender"] == last_sender:
            turns[-1] += "\n" + text
        elif text:
            turns.append(text)
            last_sender = message["sender"]
    return turns


def _documents(*, max_characters: int) -> Iterator[Text]:
    """Modules of the standard library as answers of the assistant, cut to whole lines within `max_characters`."""
    library = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if EXCLUDED_FOLDERS & set(name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(source) < MIN_DOCUMENT_CHARACTERS:
            continue
        yield Text(
            origin=f"derived from CPython {version} sources: {name.as_posix()}",
            messages=[
                {"role": "user", "content": f"Show me the source of {name.as_posix()}."},
                {"role": "assistant", "content": _whole_lines(source, max_characters)},
            ],
            is_document=True,
            is_cut=len(source) > max_characters,
        )


def _whole_lines(text: str, max_characters: int) -> str:
    """The longest prefix of `text` that ends with a line and has at most `max_characters` characters."""
    return text if len(text) <= max_characters else text[: text.rfind("\n", 0, max_characters) + 1]


def _shuffled(texts: Iterable[Text], rng: random.Random) -> list[Text]:
    texts = list(texts)
    rng.shuffle(texts)
    return texts


def _take(pool: list[Text], budget: int) -> list[Text]:
    """Remove from the pool, in its order, every text that fits into the rest of the budget (in characters)."""
    taken, left = [], []
    remaining = budget
    for text in pool:
        if text.num_characters <= remaining:
            taken.append(text)
            remaining -= text.num_characters
        else:
            left.append(text)
    if not left and remaining > budget // 10:
        raise ConfigError(
            f"the corpus has {budget - remaining:,} characters, but {budget:,} are requested; request less"
        )
    pool[:] = left
    return taken


def _train_tokenizer(texts: Sequence[Text], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE trained on the messages, as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pairs.train_from_iterator((message["content"] for text in texts for message in text.messages), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_pairs, eos_token=END_TOKEN, pad_token=PAD_TOKEN)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _fit(text: Text, tokenizer: ChatTokenizer, max_tokens: int) -> Text:
    """Cut a document to whole lines until the sample has at most `max_tokens` tokens."""
    while text.is_document and (num_tokens := _num_tokens([text], tokenizer)[0]) > max_tokens:
        request, answer = text.messages
        shorter = _whole_lines(answer["content"], len(answer["content"]) * max_tokens // num_tokens)
        text = replace(text, messages=[request, answer | {"content": shorter}], is_cut=True)
    return text


def _num_tokens(texts: Iterable[Text], tokenizer: ChatTokenizer) -> list[int]:
    chats = [tokenizer.render(Chat(where=text.origin, messages=text.messages)) for text in texts]
    return [sample.tokens.size for sample in tokenizer.encode(chats)]


def _write_split(path: Path, texts: Sequence[Text], tokenizer: ChatTokenizer) -> SplitSummary:
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"origin": text.origin, "messages": text.messages}, ensure_ascii=False) + "\n")
    lengths = list(zip(texts, _num_tokens(texts, tokenizer), strict=True))
    documents = [text for text in texts if text.is_document]
    return SplitSummary(
        path=path,
        num_conversations=len(texts) - len(documents),
        num_documents=len(documents),
        num_documents_cut=sum(text.is_cut for text in documents),
        conversation_tokens=sum(length for text, length in lengths if not text.is_document),
        document_tokens=sum(length for text, length in lengths if text.is_document),
        longest=max(length for _, length in lengths),
    )
