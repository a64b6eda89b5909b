"""What a token store records about itself: `manifest.json`, the names of its files and their hashes.

Versions: `format_version` numbers the layout of a store, that is the names, dtypes and meaning of its files and the
fields of the manifest. A change to any of them raises FORMAT_VERSION by one. A release reads its own version only:

* An older store is migrated if its tokens, loss masks and lengths remain valid: the change that raises FORMAT_VERSION
  then makes `Manifest.read` convert the older fields in memory. The files on disk stay as they are, and so does the
  fingerprint by which plans and checkpoints name their data. Any other older store is refused: `hbp prepare` must make
  it again.
* A newer store is refused: it requires a newer megatron_hbp.

A refusal is a DataError of one line that says how to go on. Version 1 is the first, so there is nothing to migrate yet.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hbp.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
LENGTHS_FILE = "lengths.npy"
LOSS_TOKENS_FILE = "loss_tokens.npy"
TOKENS_PREFIX = "tokens"
LOSS_MASK_PREFIX = "loss_mask"

BULK_FILES = (f"{TOKENS_PREFIX}.bin", f"{LOSS_MASK_PREFIX}.bin")
"""As large as the data: `TokenStore.open` checks their sizes, `TokenStore.verify` their hashes."""
INDEX_FILES = (f"{TOKENS_PREFIX}.idx", f"{LOSS_MASK_PREFIX}.idx", LENGTHS_FILE, LOSS_TOKENS_FILE)
"""About 60 bytes per sample in total, hashed at every open: one wrong pointer would silently train on other text."""

BLOCK_BYTES = 1 << 20
"""Bytes hashed at a time."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, *, on_progress: Callable[[int], None] = lambda bytes_read: None) -> "FileInfo":
        """Measure a file; `on_progress` gets the number of bytes read since its last call. Raises OSError."""
        digest = hashlib.sha256()
        bytes_read = 0
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                bytes_read += len(block)
                on_progress(len(block))
        return cls(bytes=bytes_read, sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer and the chat template that made the tokens."""

    name: str
    """As given on the command line: a directory or a hub name."""
    sha256: str
    """Over the tokenizer's files: it is the same for the same tokenizer at another path."""
    chat_template_sha256: str
    vocab_size: int
    """Entries, including added tokens; every token ID is below it."""
    eos_id: int | None
    pad_id: int | None


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One input file: what it contained and what was skipped."""

    path: str
    sha256: str
    bytes: int
    num_lines: int
    num_samples: int
    skipped: Mapping[str, int]
    """Lines skipped in lenient mode, by kind of fault."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The identity of a store. Plans and checkpoints name their data by `fingerprint`."""

    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    max_length: int | None
    tokenizer: TokenizerInfo
    sources: tuple[SourceInfo, ...]
    files: Mapping[str, FileInfo]
    fingerprint: str
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read `manifest.json`; raises DataError when it is missing, damaged, or of another version."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            _check_version(fields["format_version"], path)
            return cls(
                **fields
                | {
                    "tokenizer": TokenizerInfo(**fields["tokenizer"]),
                    "sources": tuple(SourceInfo(**source) for source in fields["sources"]),
                    "files": {name: FileInfo(**info) for name, info in fields["files"].items()},
                }
            )
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; a token store made by `hbp prepare` is required"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged: {error}; run `hbp prepare` again") from error


def _check_version(version: int, path: Path) -> None:
    if version == FORMAT_VERSION:
        return
    update = "update megatron_hbp, or " if version > FORMAT_VERSION else ""
    raise DataError(
        f"{path}: token store of format {version}, but this megatron_hbp reads format {FORMAT_VERSION}; "
        f"{update}run `hbp prepare` again"
    )


def fingerprint(files: Mapping[str, FileInfo]) -> str:
    """SHA-256 hex over the hashes of tokens, loss mask and lengths: it depends on content, not on paths or dates."""
    content = (*BULK_FILES, LENGTHS_FILE)
    return hashlib.sha256("".join(f"{name} {files[name].sha256}\n" for name in content).encode()).hexdigest()
