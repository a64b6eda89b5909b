"""Megatron-LM's IndexedDataset, imported on first use and without its warnings.

The import takes 5 s of CPU time, which `hbp --help` and `hbp plan` do not need.
"""

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
    """Create the data set `folder/prefix.bin`; raises OSError."""
    with _quiet():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        return IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=dtype)


def open_reader(folder: Path, prefix: str) -> "IndexedDataset":
    """Map the data set `folder/prefix.bin` and its index into memory."""
    with _quiet():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(str(folder / prefix), mmap=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about packages that only GPUs require, and about a rank that exists in training only."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
