"""Megatron's IndexedDataset, imported late and quietly: 5 s of CPU that `hbp --help` and `hbp plan` do without."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def open_builder(folder: Path, prefix: str, dtype: type[np.number]) -> "IndexedDatasetBuilder":
    """Start the data set `folder/prefix.bin`; raises OSError."""
    with _quiet():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        return IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=dtype)


def open_reader(folder: Path, prefix: str) -> "IndexedDataset":
    """Map the data set `folder/prefix.bin` with its index."""
    with _quiet():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(str(folder / prefix), mmap=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence remarks on packages that only GPUs need, and on a rank that only training has."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
