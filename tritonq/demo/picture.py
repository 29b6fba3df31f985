"""One picture of a run: loss curves, and a layer's weights on the grid that they are stored on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq.demo.training import History
from tritonq.nn import QATLayer
from tritonq.nn.fixed_point_layer import FixedPointLayer

_FLOAT, _QAT, _GRID = "#4c78a8", "#e45756", "#b9b9b9"


@dataclass(frozen=True)
class ChannelOnGrid:
    """The n weights of one out channel.

    Attributes:
        codes: codes minus zero point, whole numbers as float32, (n,).
        values: the weights themselves, (n,): with a BatchNorm folded in, before rounding.
        scale: of the codes.
        index: of the channel, from 0.
    """

    codes: Tensor
    values: Tensor
    scale: float
    index: int


def draw(path: Path, float_run: History, qat_run: History, layer_name: str, channel: ChannelOnGrid | None) -> None:
    """Write a PNG with the two loss curves and the weight histogram of one out channel; each bar is one code.

    Args:
        path: the file, which is replaced if it exists; its folder must exist.
        float_run: losses of float training, one per epoch.
        qat_run: losses of fine-tuning, one per epoch, which are drawn to the right of those of float training.
        layer_name: the layer's name in the model, for the title.
        channel: the weights; None: the curves are drawn alone.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = 1 if channel is None else 2
    figure, axes = plt.subplots(1, parts, figsize=(5.5 * parts, 4.2), constrained_layout=True, squeeze=False)
    _draw_losses(axes[0, 0], float_run, qat_run)
    if channel is not None:
        _draw_channel(axes[0, 1], layer_name, channel)
    for part in axes.flat:
        part.legend(frameon=False)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Any, float_run: History, qat_run: History) -> None:
    start = len(float_run.losses)
    axes.plot(range(1, start + 1), float_run.losses, color=_FLOAT, marker="o", markersize=3, label="float training")
    axes.plot(
        range(start + 1, start + len(qat_run.losses) + 1),
        qat_run.losses,
        color=_QAT,
        marker="o",
        markersize=3,
        label="QAT fine-tuning",
    )
    axes.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log", title="Loss")


def _draw_channel(axes: Any, layer_name: str, channel: ChannelOnGrid) -> None:
    codes, values, scale = channel.codes, channel.values, channel.scale
    low, high = int(codes.min()) - 1, int(codes.max()) + 1
    axes.hist(codes.numpy(), bins=[k - 0.5 for k in range(low, high + 2)], color=_QAT, label="stored codes")
    for code in range(low, high + 1):
        axes.axvline(code, color=_GRID, linewidth=0.3, zorder=0)
    axes.plot(
        values.numpy() / scale,
        torch.full_like(values, -0.03 * axes.get_ylim()[1]),
        "|",
        color=_FLOAT,
        markersize=7,
        label="float weights",
    )
    axes.set(
        xlabel=f"weight / scale (grid lines: codes; scale {scale:.3g})",
        ylabel="weights per code",
        title=f"{layer_name}, out channel {channel.index}",
    )


@torch.no_grad()
def widest_channel(layer: QATLayer | FixedPointLayer) -> ChannelOnGrid | None:
    """Return codes, weights and scale of the out channel with the largest scale.

    Of several it is that with the largest weight in magnitude. Weights are compared before rounding, with a BatchNorm
    folded in. None: no codes can be made of a `QATLayer`, since a grid of input or weight is unknown, off, in groups or
    not of integers, or the input's is per channel.
    """
    if isinstance(layer, FixedPointLayer):
        integers = layer.integers()
        codes, values = integers.weight.flatten(1), layer.effective_parameters()[0].flatten(1)
        scales = torch.exp2(-(integers.frac_len - layer.input_format.rounded_frac_len()).double())
    else:
        made = layer.integer_layer(*layer.folded_parameters())
        if made is None:
            return None
        codes, values = (
            layer.linear_map.to_rows(rows).flatten(1) for rows in (made.weight, layer.folded_parameters()[0])
        )
        scales = (made.multiplier / made.input_scale).double()
    widths = torch.where(scales == scales.max(), values.abs().amax(1).double(), -1)
    index = int(widths.argmax())
    return ChannelOnGrid(codes[index].float(), values[index], float(scales[index]), index)
