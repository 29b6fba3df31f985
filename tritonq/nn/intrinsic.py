"""Rows of float modules that become one quantized layer: fusion makes them, and `prepare_qat` replaces them.

Each is a Sequential and computes what its parts compute. "ReLU" is a ReLU, ReLU6 or ``Hardtanh(0, b)``: the layer that
takes the row's place gets the upper bound of that activation. Source: torch.ao.nn.intrinsic.
"""

from torch import nn


class FusedModule(nn.Sequential):
    """Base class of all fused rows of modules."""


class ConvBn1d(FusedModule):
    """Conv1d, BatchNorm1d."""


class ConvBn2d(FusedModule):
    """Conv2d, BatchNorm2d."""


class ConvBn3d(FusedModule):
    """Conv3d, BatchNorm3d."""


class ConvBnReLU1d(FusedModule):
    """Conv1d, BatchNorm1d, ReLU."""


class ConvBnReLU2d(FusedModule):
    """Conv2d, BatchNorm2d, ReLU."""


class ConvBnReLU3d(FusedModule):
    """Conv3d, BatchNorm3d, ReLU."""


class ConvReLU1d(FusedModule):
    """Conv1d, ReLU."""


class ConvReLU2d(FusedModule):
    """Conv2d, ReLU."""


class ConvReLU3d(FusedModule):
    """Conv3d, ReLU."""


class LinearReLU(FusedModule):
    """Linear, ReLU."""


class LinearBn1d(FusedModule):
    """Linear, BatchNorm1d."""


class LinearBnReLU1d(FusedModule):
    """Linear, BatchNorm1d, ReLU."""


class ConvTransposeBn2d(FusedModule):
    """ConvTranspose2d, BatchNorm2d."""


class ConvTransposeBnReLU2d(FusedModule):
    """ConvTranspose2d, BatchNorm2d, ReLU."""


class ConvTransposeReLU2d(FusedModule):
    """ConvTranspose2d, ReLU."""
