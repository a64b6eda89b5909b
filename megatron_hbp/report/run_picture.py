"""Training runs as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hbp.report.picture import pyplot, save_picture


def draw_runs(
    steps: Mapping[str, Sequence[Mapping[str, Any]]],
    held_out: Mapping[str, float | None],
    entropy: float,
    path: Path,
) -> None:
    """Draw the loss of each run over trained tokens, its held-out loss, and the unigram entropy; PNG or SVG by suffix.

    `steps` are the "step" lines of each run's metrics file (training/metrics.py); losses in nats per token.
    """
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for (name, lines), color in zip(steps.items(), ("#3d6b99", "#b0413e", "#5b8c5a", "#8a6bb1"), strict=False):
        tokens, total = [], 0
        for line in lines:
            total += line["tokens"]
            tokens.append(total / 1000)
        axes.plot(tokens, [line["loss"] for line in lines], color=color, label=f"{name}, training")
        loss = held_out.get(name)
        if loss is not None:
            axes.plot(tokens[-1:], [loss], "o", color=color, label=f"{name}, held out {loss:.3f}")
    axes.axhline(entropy, color="black", linestyle=":", label=f"unigram entropy {entropy:.3f}")
    axes.set_xlabel("trained tokens, thousands")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    save_picture(figure, path)
