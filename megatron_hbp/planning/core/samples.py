"""What a plan is made from, and reading it from bare .npy files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hbp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """Lengths and what belongs to them."""

    lengths: np.ndarray
    """int64 [samples], tokens."""
    loss_tokens: np.ndarray | None = None
    """int64 [samples], supervised tokens."""
    store_fingerprint: str | None = None


def read_lengths(path: Path, loss_path: Path | None = None) -> PlanInput:
    """Read lengths, and loss tokens if given, from .npy files. Raises DataError."""
    lengths = _read_npy(path)
    return PlanInput(lengths=lengths, loss_tokens=_read_loss(loss_path, lengths))


def _read_loss(path: Path | None, lengths: np.ndarray) -> np.ndarray | None:
    if path is None:
        return None
    loss = _read_npy(path)
    if loss.shape != lengths.shape:
        raise DataError(f"{path} has {loss.size} loss-token counts for {lengths.size} samples; both must match")
    if len(loss) and (loss.min() < 0 or (loss > lengths).any()):
        where = int(((loss < 0) | (loss > lengths)).argmax())
        raise DataError(f"{path}: sample {where} has {int(loss[where])} loss tokens of {int(lengths[where])} tokens")
    return loss


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not a NumPy .npy file ({error}); write one with numpy.save") from error
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(f"{path} must hold a list of whole numbers, found {values.dtype} of shape {values.shape}")
    if values.size and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"{path}: entry {int(values.argmax())} is {values.max()}, more than a sample can have")
    return values.astype(np.int64)
