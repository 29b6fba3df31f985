"""Rows of float modules that become one quantized layer: fusion makes them, and `prepare_qat` replaces them.

Each is a Sequential and computes what its parts compute. "ReLU" is a ReLU, ReLU6 or ``Hardtanh(0, b)``: the layer that
takes the row's place gets the upper bound of that activation. Source: torch.ao.nn.intrinsic.
"""

from torch import nn


class FusedModule(nn.Sequential):
    """Base class of all fused rows, made of their modules in order: ``ConvBn2d(conv, bn)``; classes are not checked."""


class ConvBn1d(FusedModule):
    """The row Conv1d, BatchNorm1d, computed one after the other."""


class ConvBn2d(FusedModule):
    """The row Conv2d, BatchNorm2d, computed one after the other."""


class ConvBn3d(FusedModule):
    """The row Conv3d, BatchNorm3d, computed one after the other."""


class ConvBnReLU1d(FusedModule):
    """The row Conv1d, BatchNorm1d, ReLU, computed one after the other."""


class ConvBnReLU2d(FusedModule):
    """The row Conv2d, BatchNorm2d, ReLU, computed one after the other."""


class ConvBnReLU3d(FusedModule):
    """The row Conv3d, BatchNorm3d, ReLU, computed one after the other."""


class ConvReLU1d(FusedModule):
    """The row Conv1d, ReLU, computed one after the other."""


class ConvReLU2d(FusedModule):
    """The row Conv2d, ReLU, computed one after the other."""


class ConvReLU3d(FusedModule):
    """The row Conv3d, ReLU, computed one after the other."""


class LinearReLU(FusedModule):
    """The row Linear, ReLU, computed one after the other."""


class LinearBn1d(FusedModule):
    """The row Linear, BatchNorm1d, computed one after the other."""


class LinearBnReLU1d(FusedModule):
    """The row Linear, BatchNorm1d, ReLU, computed one after the other."""


class ConvTransposeBn2d(FusedModule):
    """The row ConvTranspose2d, BatchNorm2d, computed one after the other."""


class ConvTransposeBnReLU2d(FusedModule):
    """The row ConvTranspose2d, BatchNorm2d, ReLU, computed one after the other."""


class ConvTransposeReLU2d(FusedModule):
    """The row ConvTranspose2d, ReLU, computed one after the other."""


class ConvTransposeBn1d(FusedModule):
    """The row ConvTranspose1d, BatchNorm1d, computed one after the other."""


class ConvTransposeBnReLU1d(FusedModule):
    """The row ConvTranspose1d, BatchNorm1d, ReLU, computed one after the other."""


class ConvTransposeReLU1d(FusedModule):
    """The row ConvTranspose1d, ReLU, computed one after the other."""


class ConvTransposeBn3d(FusedModule):
    """The row ConvTranspose3d, BatchNorm3d, computed one after the other."""


class ConvTransposeBnReLU3d(FusedModule):
    """The row ConvTranspose3d, BatchNorm3d, ReLU, computed one after the other."""


class ConvTransposeReLU3d(FusedModule):
    """The row ConvTranspose3d, ReLU, computed one after the other."""
