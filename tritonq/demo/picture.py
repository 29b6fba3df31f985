"""One picture of a run: loss curves, and a layer's weights on the grid that they are stored on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tritonq.demo.training import History
from tritonq.nn import QATLayer

_FLOAT, _QAT, _GRID = "#4c78a8", "#e45756", "#b9b9b9"


def draw(path: Path, float_run: History, qat_run: History, layer_name: str, layer: QATLayer) -> None:
    """Write a PNG with the two loss curves and the weight histogram of one out channel of ``layer``.

    The channel shown is the one with the largest scale; each bar is one code of its grid.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)

    start = len(float_run.losses)
    left.plot(range(1, start + 1), float_run.losses, color=_FLOAT, marker="o", markersize=3, label="float training")
    left.plot(
        range(start + 1, start + len(qat_run.losses) + 1),
        qat_run.losses,
        color=_QAT,
        marker="o",
        markersize=3,
        label="QAT fine-tuning",
    )
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log", title="Loss")
    left.legend(frameon=False)

    codes, values, scale, channel = _largest_channel(layer)
    low, high = int(codes.min()) - 1, int(codes.max()) + 1
    right.hist(codes.numpy(), bins=[k - 0.5 for k in range(low, high + 2)], color=_QAT, label="stored codes")
    for code in range(low, high + 1):
        right.axvline(code, color=_GRID, linewidth=0.3, zorder=0)
    right.plot(
        values.numpy() / scale,
        torch.full_like(values, 0.0) - 0.03 * right.get_ylim()[1],
        "|",
        color=_FLOAT,
        markersize=7,
        label="float weights",
    )
    right.set(
        xlabel=f"weight / scale (grid lines: codes; scale {scale:.3g})",
        ylabel="weights per code",
        title=f"{layer_name}, out channel {channel}",
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def _largest_channel(layer: QATLayer) -> tuple[Tensor, Tensor, float, int]:
    """Codes, float values, scale and index of the out channel whose weights spread widest."""
    rows = layer.to_rows(layer.folded_parameters()[0])
    integers = layer.integer_layer(*layer.folded_parameters())
    if integers is None:
        raise ValueError("this layer has no integer form: its input grid is unknown")
    scales = integers.multiplier / integers.input_scale
    channel = int(scales.argmax())
    return layer.to_rows(integers.weight)[channel].flatten(), rows[channel].flatten(), float(scales[channel]), channel
