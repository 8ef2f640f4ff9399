"""Pictures of a run: routing heat-maps and the loss curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

LABELS = {"timestep": "time (0 image, 1 noise)", "position": "patch position", "class": "class"}


def plot_shares(share: Tensor, axis: str, numbers: Sequence[int], path: Path) -> None:
    """One panel per layer: share of selections (L, rows, E) as expert x row; white is the uniform share. ``numbers``: of the layers."""
    layers, rows, experts = share.shape
    columns = min(layers, 6)
    height = -(-layers // columns)
    figure, panels = plt.subplots(height, columns, figsize=(2.1 * columns + 0.8, 1.9 * height + 0.5), squeeze=False, layout="constrained")
    uniform = 1 / experts
    for layer, panel in enumerate(panels.flat):
        if layer >= layers:
            panel.axis("off")
            continue
        panel.imshow(share[layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 * uniform, interpolation="nearest")
        panel.set_title(f"layer {numbers[layer]}", fontsize=8)
        panel.set_xticks([0, rows - 1], ["0", "1"] if axis == "timestep" else ["0", str(rows - 1)], fontsize=7)
        panel.set_yticks(range(experts) if experts <= 8 else [0, experts - 1])
        panel.tick_params(labelsize=7)
    figure.supxlabel(LABELS[axis], fontsize=9)
    figure.supylabel("expert", fontsize=9)
    bar = figure.colorbar(panels.flat[0].images[0], ax=panels, shrink=0.8, ticks=[0, uniform, 2 * uniform])
    bar.ax.set_yticklabels(["0", f"{uniform:.2f} (uniform)", f">= {2 * uniform:.2f}"], fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss per step and validation loss."""
    figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
    panel.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.8, label="training")
    held_out = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if held_out:
        panel.plot(*zip(*held_out, strict=True), "o-", markersize=3, label="held-out (EMA, mean of 8 times)")
    panel.set(xlabel="step", ylabel="loss")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
