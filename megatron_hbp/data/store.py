"""Reading a token store: tokens and loss mask of every sample, memory-mapped from disk.

    STORE/tokens.bin, .idx      Megatron IndexedDataset, int32
    STORE/loss_mask.bin, .idx   Megatron IndexedDataset, uint8
    STORE/lengths.npy           int64 [num_samples], tokens of each sample
    STORE/loss_tokens.npy       int64 [num_samples], ones in each sample's loss mask
    STORE/manifest.json         counts, tokenizer, sources, sizes and hashes, fingerprint

The mask marks the *targets*: `loss_mask[i] == 1` means that token i is to be predicted from the tokens before
it. The code that feeds the model shifts the mask.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_hbp.data.indexed import open_reader
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
    fingerprint,
)
from megatron_hbp.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

READ_GAP = 128 * 1024
"""The largest gap in bytes between two samples that is read rather than skipped: Linux reads as much ahead anyway."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStore:
    """An opened store. Lengths and counts are in memory; samples are read on demand, by any number of processes."""

    path: Path
    manifest: Manifest = field(repr=False)
    lengths: NDArray[np.int64] = field(repr=False)
    """int64 [num_samples]"""
    loss_tokens: NDArray[np.int64] = field(repr=False)
    """int64 [num_samples], ones in each sample's loss mask"""

    @classmethod
    def open(cls, path: Path | str) -> "TokenStore":
        """Open a store and check it against its manifest: every size, and the hashes of all but the bulk files.

        Raises DataError that names the file when one is missing, truncated or damaged.
        """
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: no such token store; make one with `hbp prepare --out {path}`")
        manifest = Manifest.read(path / MANIFEST_FILE)
        _check_files(path, manifest)
        store = cls(
            path=path,
            manifest=manifest,
            lengths=_load(path / LENGTHS_FILE),
            loss_tokens=_load(path / LOSS_TOKENS_FILE),
        )
        store._check_counts()
        return store

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.manifest.num_samples

    @property
    def fingerprint(self) -> str:
        """SHA-256 hex over the store's tokens, masks and lengths."""
        return self.manifest.fingerprint

    def __getstate__(self) -> dict[str, object]:
        """Leave the mapped files out of a pickle: the process that loads it maps them itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_masks")}

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (tokens int64 [n], loss mask uint8 [n]) of one sample, both as copies; raises IndexError."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.path}")
        return self._tokens[index].astype(np.int64), self._masks[index].copy()

    def will_need(self, indices: NDArray[np.integer]) -> int:
        """Request that the system read samples `indices` int [n] ahead, in file order, without waiting for it.

        Returns the number of bytes requested, including the gaps that are read with the samples; 0 where the system
        has no such request.
        """
        if not hasattr(os, "posix_fadvise"):
            return 0
        requested = 0
        for name, reader in ((TOKENS_PREFIX, self._tokens), (LOSS_MASK_PREFIX, self._masks)):
            starts = reader.index.sequence_pointers[indices]
            ends = starts + reader.index.sequence_lengths[indices].astype(np.int64) * reader.index.dtype_size
            file = os.open(self.path / f"{name}.bin", os.O_RDONLY)
            try:
                for start, end in _joined(starts, ends):
                    os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)
                    requested += end - start
            finally:
                os.close(file)
        return requested

    @property
    def bulk_bytes(self) -> int:
        """Bytes that `verify` reads."""
        return sum(self.manifest.files[name].bytes for name in BULK_FILES)

    def verify(self, *, on_progress: Callable[[int], None] = lambda bytes_read: None) -> None:
        """Hash the bulk files, which `open` does not (about 1 GB/s); raises DataError for the first that has changed.

        `on_progress` gets the number of bytes read since its last call.
        """
        for name in BULK_FILES:
            _check_hash(self.path / name, self.manifest.files[name], on_progress=on_progress)

    @cached_property
    def _tokens(self) -> "IndexedDataset":
        return open_reader(self.path, TOKENS_PREFIX)

    @cached_property
    def _masks(self) -> "IndexedDataset":
        return open_reader(self.path, LOSS_MASK_PREFIX)

    def _check_counts(self) -> None:
        found = (len(self.lengths), int(self.lengths.sum()), len(self.loss_tokens), int(self.loss_tokens.sum()))
        manifest = self.manifest
        stated = (manifest.num_samples, manifest.num_tokens, manifest.num_samples, manifest.num_loss_tokens)
        if found != stated:
            raise _damaged(self.path / MANIFEST_FILE, f"counts {stated} do not match the data, which has {found}")


def _joined(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Sort spans [starts, ends), and join those with at most READ_GAP bytes between them."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] - ends[:-1] > READ_GAP)))
    last = np.append(first[1:], len(starts)) - 1
    return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))


def _check_files(path: Path, manifest: Manifest) -> None:
    for name in (*BULK_FILES, *INDEX_FILES):
        stated = manifest.files.get(name)
        if stated is None:
            raise _damaged(path / MANIFEST_FILE, f"{name} is not in its list of files")
        if not (path / name).is_file():
            raise _damaged(path / name, "missing")
        size = (path / name).stat().st_size
        if size != stated.bytes:
            raise _damaged(path / name, f"{size} bytes, the manifest says {stated.bytes}")
    for name in INDEX_FILES:
        _check_hash(path / name, manifest.files[name])
    if fingerprint(manifest.files) != manifest.fingerprint:
        raise _damaged(path / MANIFEST_FILE, "the fingerprint does not match the hashes of the files")


def _check_hash(path: Path, stated: FileInfo, *, on_progress: Callable[[int], None] = lambda bytes_read: None) -> None:
    try:
        found = FileInfo.of(path, on_progress=on_progress)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    if found != stated:
        raise _damaged(path, f"SHA-256 is {found.sha256[:12]}..., the manifest says {stated.sha256[:12]}...")


def _load(path: Path) -> NDArray[np.int64]:
    try:
        values: NDArray[np.int64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if values.dtype != np.int64 or values.ndim != 1:
        raise _damaged(path, f"{values.dtype} {list(values.shape)}, expected int64 [num_samples]")
    return values


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: token store damaged: {what}; run `hbp prepare` again")
