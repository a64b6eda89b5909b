"""Writing a token store: it appears complete under its name, or not at all."""

import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from megatron_hbp.data.indexed import open_builder
from megatron_hbp.data.manifest import (
    BULK_FILES,
    INDEX_FILES,
    LENGTHS_FILE,
    LOSS_MASK_PREFIX,
    LOSS_TOKENS_FILE,
    MANIFEST_FILE,
    TOKENS_PREFIX,
    FileInfo,
    Manifest,
    SourceInfo,
    TokenizerInfo,
    fingerprint,
)
from megatron_hbp.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


class StoreWriter:
    """A context that collects samples in a hidden directory next to `out`, which `finish` renames to `out`.

    Without `finish` (an error, Ctrl-C) it removes what it wrote; a killed process leaves `.NAME.partial-PID` and no
    store. Raises ConfigError when `out` exists (without `overwrite`, or if it is not a token store), and DiskError when
    something cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = out
        self._partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        self._builders: dict[str, IndexedDatasetBuilder] = {}
        self._lengths = array("q")
        self._loss_tokens = array("q")
        self._refuse_existing(overwrite)

    def __enter__(self) -> Self:
        """Create the hidden directory and open the two data sets in it."""
        with self._disk_errors():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            for prefix, dtype in ((TOKENS_PREFIX, np.int32), (LOSS_MASK_PREFIX, np.uint8)):
                self._builders[prefix] = open_builder(self._partial, prefix, dtype)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove an unfinished store."""
        self._discard()

    def add(self, tokens: NDArray[np.int32], loss_mask: NDArray[np.uint8]) -> None:
        """Append one sample: tokens int32 [n] and loss mask uint8 [n], n > 0."""
        import torch

        assert tokens.shape == loss_mask.shape and tokens.size > 0, (tokens.shape, loss_mask.shape)
        with self._disk_errors():
            for prefix, values in ((TOKENS_PREFIX, tokens), (LOSS_MASK_PREFIX, loss_mask)):
                self._builders[prefix].add_item(torch.from_numpy(values))
                self._builders[prefix].end_document()
        self._lengths.append(tokens.size)
        self._loss_tokens.append(int(loss_mask.sum()))

    def finish(self, *, tokenizer: TokenizerInfo, sources: Sequence[SourceInfo], max_length: int | None = None) -> None:
        """Write indices, lengths and manifest, flush everything to disk and give the store its name."""
        with self._disk_errors():
            for prefix, builder in self._builders.items():
                builder.finalize(str(self._partial / f"{prefix}.idx"))
            np.save(self._partial / LENGTHS_FILE, np.array(self._lengths, dtype=np.int64))
            np.save(self._partial / LOSS_TOKENS_FILE, np.array(self._loss_tokens, dtype=np.int64))
            files = {name: FileInfo.of(self._partial / name) for name in (*BULK_FILES, *INDEX_FILES)}
            manifest = Manifest(
                num_samples=len(self._lengths),
                num_tokens=sum(self._lengths),
                num_loss_tokens=sum(self._loss_tokens),
                max_length=max_length,
                tokenizer=tokenizer,
                sources=tuple(sources),
                files=files,
                fingerprint=fingerprint(files),
            )
            (self._partial / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            for path in (*self._partial.iterdir(), self._partial):
                _flush_to_disk(path)
            self._take_name()

    def _take_name(self) -> None:
        old = self._partial.with_name(f"{self._partial.name}.old")
        if self.out.exists():
            self.out.rename(old)
        self._partial.rename(self.out)
        _flush_to_disk(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _refuse_existing(self, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not overwrite:
            raise ConfigError(f"--out {self.out} exists; choose another name, or pass --overwrite to replace the store")
        if not (self.out / MANIFEST_FILE).is_file():
            raise ConfigError(f"--out {self.out} is not a token store, so it is not overwritten; choose another name")

    def _discard(self) -> None:
        for builder in self._builders.values():
            with suppress(OSError):  # on a full disk, closing fails again for what is still in the buffer
                builder.data_file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            raise DiskError(
                f"{self.out}: cannot be written: {error.strerror or error}; check free space and permissions of "
                f"{self.out.parent} (no partial store was left there)"
            ) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
