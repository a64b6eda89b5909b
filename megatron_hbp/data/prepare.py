"""Chat files to a token store, in one pass and in bounded memory.

JsonlFile -> Line -> Record -> Chat -> RenderedChat -> (batches of about a million characters) -> Sample -> StoreWriter
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hbp.data.chats import BadChat, Fault
from megatron_hbp.data.formats import read_chat
from megatron_hbp.data.jsonl import JsonlFile, decode, input_bytes
from megatron_hbp.data.manifest import SourceInfo
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.tokenizer import ChatTokenizer, RenderedChat, Sample
from megatron_hbp.data.writer import StoreWriter
from megatron_hbp.errors import ConfigError, DataError

BATCH_CHARACTERS = 1 << 20
"""Per batch: keeps all cores of the tokenizer busy, and its offsets, which are Python tuples, take about 50 MB."""


@dataclass(kw_only=True)
class Skips:
    """How bad chats are handled: raised when strict, counted by kind when lenient."""

    lenient: bool
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, bad: BadChat) -> None:
        """Count a bad chat, or raise it."""
        if not self.lenient:
            raise bad
        self.counts[bad.fault.value] += 1


def prepare_store(
    *,
    inputs: Sequence[Path],
    tokenizer: ChatTokenizer,
    out: Path,
    lenient: bool = False,
    max_length: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda bytes_read: None,
) -> TokenStore:
    """Tokenise chat files into a new store and open it; its manifest counts what was skipped, per source.

    A sample of more than `max_length` tokens is a bad chat: none is truncated. `on_progress` gets the number of bytes
    read since its last call. Raises DataError (65) for bad chats and when no chat is left, ConfigError (78) when `out`
    exists, DiskError (73) when it cannot be written.
    """
    input_bytes(inputs)
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max-length {max_length}: a sample needs at least 2 tokens")
    sources = []
    with StoreWriter(out, overwrite=overwrite) as writer:
        for path in inputs:
            sources.append(_add_file(path, tokenizer, writer, Skips(lenient=lenient), max_length, on_progress))
        if not any(source.num_samples for source in sources):
            raise DataError(f"{', '.join(map(str, inputs))}: no chat to train on{_skipped_note(sources)}")
        writer.finish(tokenizer=tokenizer.info, sources=sources, max_length=max_length)
    return TokenStore.open(out)


def skipped_by_kind(sources: Iterable[SourceInfo]) -> Counter[str]:
    """Count the lines skipped in all sources, by kind of fault."""
    return sum((Counter(source.skipped) for source in sources), Counter())


def _add_file(
    path: Path,
    tokenizer: ChatTokenizer,
    writer: StoreWriter,
    skips: Skips,
    max_length: int | None,
    on_progress: Callable[[int], None],
) -> SourceInfo:
    file = JsonlFile(path=path)
    num_samples = reported = 0
    for batch in _batches(_rendered(file, tokenizer, skips)):
        for sample in tokenizer.encode(batch):
            if bad := _unusable(sample, max_length):
                skips.add(bad)
            else:
                writer.add(sample.tokens, sample.loss_mask)
                num_samples += 1
        on_progress(file.bytes_read - reported)
        reported = file.bytes_read
    on_progress(file.bytes_read - reported)
    return SourceInfo(
        path=str(path),
        sha256=file.sha256,
        bytes=file.bytes_read,
        num_lines=file.num_lines,
        num_samples=num_samples,
        skipped=dict(skips.counts),
    )


def _rendered(file: JsonlFile, tokenizer: ChatTokenizer, skips: Skips) -> Iterator[RenderedChat]:
    for line in file:
        try:
            rendered = tokenizer.render(read_chat(decode(line), line.where))
        except BadChat as bad:
            skips.add(bad)
        else:
            yield rendered


def _batches(chats: Iterable[RenderedChat]) -> Iterator[list[RenderedChat]]:
    batch: list[RenderedChat] = []
    num_characters = 0
    for chat in chats:
        batch.append(chat)
        num_characters += len(chat.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _unusable(sample: Sample, max_length: int | None) -> BadChat | None:
    if max_length is not None and sample.tokens.size > max_length:
        return BadChat(sample.where, Fault.TOO_LONG, f"{sample.tokens.size} tokens, more than {max_length}")
    if not sample.loss_mask.any():
        return BadChat(sample.where, Fault.NO_LOSS, "the template marks none of this chat's tokens as generated")
    return None


def _skipped_note(sources: Sequence[SourceInfo]) -> str:
    counts = skipped_by_kind(sources)
    return f" (skipped: {', '.join(f'{number} {fault}' for fault, number in counts.items())})" if counts else ""
