"""Pictures as files: matplotlib without a screen, and one way to say that a file could not be written."""

from pathlib import Path
from typing import Any

from megatron_hbp.errors import DiskError


def pyplot() -> Any:
    """matplotlib.pyplot for files; imported late, as it takes half a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure: Any, path: Path) -> None:
    """Write `figure` to `path`, PNG or SVG by suffix, and close it. Raises DiskError."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DiskError(f"picture could not be written to {path}: {error}; use a .png or .svg path") from error
    finally:
        pyplot().close(figure)
