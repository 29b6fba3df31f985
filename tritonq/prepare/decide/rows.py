"""The rows of modules that become one layer. A *row* is several modules, each of which alone reads the one before."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.nn import intrinsic

Types = tuple[type[nn.Module], ...]

# Which rows of modules quantization treats as one, and as what. ReLU stands for ReLU6 and Hardtanh(0, b) too.
ROWS: dict[Types, type[intrinsic.FusedModule]] = {
    (nn.Conv1d, nn.BatchNorm1d): intrinsic.ConvBn1d,
    (nn.Conv2d, nn.BatchNorm2d): intrinsic.ConvBn2d,
    (nn.Conv3d, nn.BatchNorm3d): intrinsic.ConvBn3d,
    (nn.Conv1d, nn.BatchNorm1d, nn.ReLU): intrinsic.ConvBnReLU1d,
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU): intrinsic.ConvBnReLU2d,
    (nn.Conv3d, nn.BatchNorm3d, nn.ReLU): intrinsic.ConvBnReLU3d,
    (nn.Conv1d, nn.ReLU): intrinsic.ConvReLU1d,
    (nn.Conv2d, nn.ReLU): intrinsic.ConvReLU2d,
    (nn.Conv3d, nn.ReLU): intrinsic.ConvReLU3d,
    (nn.Linear, nn.ReLU): intrinsic.LinearReLU,
    (nn.Linear, nn.BatchNorm1d): intrinsic.LinearBn1d,
    (nn.Linear, nn.BatchNorm1d, nn.ReLU): intrinsic.LinearBnReLU1d,
    (nn.ConvTranspose2d, nn.BatchNorm2d): intrinsic.ConvTransposeBn2d,
    (nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU): intrinsic.ConvTransposeBnReLU2d,
    (nn.ConvTranspose2d, nn.ReLU): intrinsic.ConvTransposeReLU2d,
    (nn.ConvTranspose1d, nn.BatchNorm1d): intrinsic.ConvTransposeBn1d,
    (nn.ConvTranspose1d, nn.BatchNorm1d, nn.ReLU): intrinsic.ConvTransposeBnReLU1d,
    (nn.ConvTranspose1d, nn.ReLU): intrinsic.ConvTransposeReLU1d,
    (nn.ConvTranspose3d, nn.BatchNorm3d): intrinsic.ConvTransposeBn3d,
    (nn.ConvTranspose3d, nn.BatchNorm3d, nn.ReLU): intrinsic.ConvTransposeBnReLU3d,
    (nn.ConvTranspose3d, nn.ReLU): intrinsic.ConvTransposeReLU3d,
}


def out_channels(layer: nn.Module) -> int | None:
    """Return a module's ``out_channels`` or else ``out_features``; None if it has neither attribute."""
    return getattr(layer, "out_channels", getattr(layer, "out_features", None))


def batch_norm_obstacle(channels: int | None, bn: _BatchNorm) -> str | None:
    """Return why a BatchNorm can't become part of a layer with ``channels`` output channels; None if it can.

    It can if it has as many features, and running statistics. With ``channels=None``, a layer that has no such number,
    it can't.
    """
    if bn.num_features != channels:
        return f"BatchNorm has {bn.num_features} features for {channels} output channels"
    if bn.running_var is None:
        return "BatchNorm has track_running_stats=False"
    return None
