"""What a plan is made from: the lengths of the samples and what belongs to them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hbp.errors import DataError

MAX_TOKENS = 2**31 - 1
"""Of a sample and of a pack: plans keep lengths as int32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Lengths of `n` samples, checked; make one with `Samples.of`."""

    lengths: np.ndarray
    """int64 [n], tokens, at least 1."""
    loss_tokens: np.ndarray | None = None
    """int64 [n], supervised tokens: steps are then alike in them too."""
    repeats: np.ndarray | None = None
    """int64 [n], how often a sample occurs in an epoch; once without it."""
    store_fingerprint: str | None = None
    """Fingerprint (hex) of the token store, where the lengths come from one."""

    @staticmethod
    def of(
        lengths: np.ndarray,
        loss_tokens: np.ndarray | None = None,
        repeats: np.ndarray | None = None,
        store_fingerprint: str | None = None,
    ) -> "Samples":
        """Check and convert. Raises DataError for anything but lists of whole numbers that match."""
        checked = _check_lengths(lengths)
        for name, values in (("loss_tokens", loss_tokens), ("repeats", repeats)):
            if values is not None and np.shape(values) != checked.shape:
                raise DataError(
                    f"{name} has shape {np.shape(values)}, the lengths have {checked.shape}; they must match"
                )
        return Samples(
            lengths=checked,
            loss_tokens=None if loss_tokens is None else np.asarray(loss_tokens, np.int64),
            repeats=None if repeats is None else np.asarray(repeats, np.int64),
            store_fingerprint=store_fingerprint,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.lengths.max())


def read_samples(path: Path, loss_path: Path | None = None) -> Samples:
    """Read lengths, and loss tokens if given, from .npy files. Raises DataError."""
    lengths = _read_npy(path)
    if loss_path is None:
        return Samples.of(lengths)
    loss = _read_npy(loss_path)
    if loss.shape != lengths.shape:
        raise DataError(f"{loss_path} has {loss.size} loss-token counts for {lengths.size} samples; both must match")
    if len(loss) and (loss.min() < 0 or (loss > lengths).any()):
        where = int(((loss < 0) | (loss > lengths)).argmax())
        raise DataError(
            f"{loss_path}: sample {where} has {int(loss[where])} loss tokens of {int(lengths[where])} tokens"
        )
    return Samples.of(lengths, loss)


def _check_lengths(values: np.ndarray) -> np.ndarray:
    """`values` as int64 [n]. Raises DataError for anything but a list of positive whole numbers."""
    lengths = np.asarray(values)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise DataError(f"lengths must be a list of whole numbers, found {lengths.dtype} of shape {lengths.shape}")
    if not len(lengths):
        raise DataError("there are no samples to plan; the list of lengths is empty")
    if lengths.min() < 1:
        raise DataError(f"sample {int(lengths.argmin())} has length {int(lengths.min())}; lengths start at 1")
    if lengths.max() > MAX_TOKENS:
        raise DataError(
            f"sample {int(lengths.argmax())} has length {int(lengths.max())}; a plan counts up to {MAX_TOKENS} tokens"
        )
    return lengths.astype(np.int64)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not a NumPy .npy file ({error}); write one with numpy.save") from error
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(f"{path} must hold a list of whole numbers, found {values.dtype} of shape {values.shape}")
    if values.size and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"{path}: entry {int(values.argmax())} is {values.max()}, more than a sample can have")
    return values.astype(np.int64)
