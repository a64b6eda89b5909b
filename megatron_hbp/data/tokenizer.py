"""Chats to tokens and loss mask, by a Hugging Face tokenizer and its chat template.

The template decides which tokens the loss is on: those of the text inside its `{% generation %}` blocks. A token is in
the mask when any of its characters is inside such a block.

`return_assistant_tokens_mask` of transformers is not used: it looks up only the *first* token of a block's last
character, so a turn that ends with an emoji (four byte-level tokens) loses three of them, and a last character that the
tokenizer drops marks everything after it. Both were observed with transformers 5; on other text the masks are equal,
which a test asserts.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_hbp.data.chats import BadChat, Chat, Fault, Record
from megatron_hbp.data.manifest import TokenizerInfo
from megatron_hbp.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A chat as the template renders it, and the half-open character spans that the assistant generates."""

    where: str
    text: str
    generated: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One tokenised chat. `tokens`: int32 [n]; `loss_mask`: uint8 [n], 1 where the token is a prediction target."""

    where: str
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTokenizer:
    """A fast Hugging Face tokenizer together with one chat template that marks what the assistant generates."""

    backend: "PreTrainedTokenizerFast"
    template: str
    info: TokenizerInfo

    @classmethod
    def load(cls, name: str, *, template_file: Path | None = None) -> "ChatTokenizer":
        """Load the tokenizer from the directory `name` or from the hub, with its own chat template or that of a file.

        Raises ConfigError when the tokenizer does not exist or is a slow one (no character offsets), or when the
        template is missing or has no `{% generation %}` block.
        """
        backend = _load_backend(name)
        template = _own_template(backend, name) if template_file is None else _read_template(template_file)
        if not GENERATION_BLOCK.search(template):
            raise ConfigError(
                f"the chat template of {template_file or name} has no {{% generation %}} block, so it does not say "
                "which tokens the assistant generates; in a copy of it, put the assistant's text and end token between "
                "{% generation %} and {% endgeneration %}, and pass that copy with --chat-template FILE"
            )
        info = TokenizerInfo(
            name=name,
            sha256=_files_sha256(name),
            chat_template_sha256=hashlib.sha256(template.encode()).hexdigest(),
            vocab_size=len(backend),
            eos_id=backend.eos_token_id,
            pad_id=backend.pad_token_id,
        )
        return cls(backend=backend, template=template, info=info)

    def render(self, chat: Chat) -> RenderedChat:
        """Render a chat as text; raises BadChat, or ConfigError when the template itself is at fault."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[_without_nulls(message) for message in chat.messages]],
                tools=chat.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.backend.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: it may raise anything
            raise BadChat(chat.where, Fault.TEMPLATE, str(error) or type(error).__name__) from error
        _check_text(texts[0], chat.where)
        return RenderedChat(where=chat.where, text=texts[0], generated=spans[0])

    def encode(self, chats: Sequence[RenderedChat]) -> Iterator[Sample]:
        """Tokenise a batch of chats; the tokenizer uses all cores."""
        encodings = self.backend(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).encodings
        for chat, encoding in zip(chats, encodings, strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            yield Sample(
                where=chat.where,
                tokens=np.array(encoding.ids, dtype=np.int32),
                loss_mask=_loss_mask(offsets, chat.generated, num_characters=len(chat.text)),
            )


def _loss_mask(
    offsets: NDArray[np.int64], generated: Sequence[tuple[int, int]], *, num_characters: int
) -> NDArray[np.uint8]:
    """Mark the tokens that contain a generated character: uint8 [n] from half-open character offsets [n, 2].

    The first token of a sample is never marked: no token precedes it from which it could be predicted.
    """
    is_generated = np.zeros(num_characters, dtype=np.int64)
    for start, stop in generated:
        is_generated[start:stop] = 1
    generated_before = np.concatenate(([0], np.cumsum(is_generated)))
    mask: NDArray[np.uint8] = (generated_before[offsets[:, 1]] > generated_before[offsets[:, 0]]).astype(np.uint8)
    mask[:1] = 0
    return mask


def _check_text(text: str, where: str) -> None:
    """Refuse characters that JSON can escape but no tokenizer can encode; raises BadChat."""
    if "\x00" in text:
        raise BadChat(where, Fault.NUL, "a message contains the character \\u0000")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"a message contains the lone surrogate \\u{ord(text[error.start]):04x}"
        raise BadChat(where, Fault.UTF8, detail) from error


def _without_nulls(message: Record) -> Record:
    """Drop keys whose value is null: templates test whether a key is present, and would write the word None."""
    return {key: value for key, value in message.items() if value is not None}


def _load_backend(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    _refuse_misspelt_path(name)
    try:
        backend = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, ImportError, and a bare Exception from the Rust side
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"--tokenizer {name}: cannot be loaded: {reason}; pass a directory with tokenizer.json, or a hub name"
        ) from error
    if not backend.is_fast:
        raise ConfigError(f"--tokenizer {name}: has no tokenizer.json, which maps tokens to characters")
    return backend


def _refuse_misspelt_path(name: str) -> None:
    """Raise ConfigError for a path that is not a directory, instead of waiting for the hub to refuse it as a name."""
    path = Path(name)
    if path.is_file():
        raise ConfigError(f"--tokenizer {name}: is a file; pass the directory that holds tokenizer.json")
    looks_like_path = name.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if looks_like_path and not path.is_dir():
        raise ConfigError(f"--tokenizer {name}: no such directory")


def _own_template(backend: "PreTrainedTokenizerFast", name: str) -> str:
    try:
        template: str = backend.get_chat_template()
    except ValueError as error:
        raise ConfigError(f"tokenizer {name} has no chat template; pass one with --chat-template FILE") from error
    return template


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read: {error}") from error


def _files_sha256(name: str) -> str:
    """Hash names and contents of the tokenizer's files, in its directory or in the hub's cache (no chat template)."""
    from transformers.utils import cached_file

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "tokenizer.json"))).parent
    digest = hashlib.sha256()
    for path in (folder / file for file in TOKENIZER_FILES):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
