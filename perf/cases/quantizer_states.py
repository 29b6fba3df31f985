"""Quantizers in the form that operators take, and torch.ao's counterparts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import tritonq
    from tritonq.grid import Grid, RangeStatistics

# Both sides: affine, per tensor, codes 0..255, moving average with torch.ao's constant.
STEPS = 255
_AVERAGING_CONSTANT = 0.01


def activation_state(device: torch.device) -> tuple[Grid, RangeStatistics]:
    """Return grid and range of an activation quantizer that has observed nothing."""
    from tritonq.grid import Grid, RangeStatistics
    from tritonq.qparams import TORCH_EPS
    from tritonq.quantized_type import QuantizedType

    def filled(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    qtype = QuantizedType(0, STEPS, symmetric=False)
    return Grid(
        filled(1.0, 1), filled(0, 1, dtype=torch.int32), qtype, filled(1, 1, dtype=torch.uint8)
    ), RangeStatistics(
        filled(torch.inf),
        filled(-torch.inf),
        filled(0, dtype=torch.int64),
        qtype.granularity,
        filled(1, 1, dtype=torch.uint8),
        averaging_constant=_AVERAGING_CONSTANT,
        eps=TORCH_EPS,
    )


def torch_ao_activation(version: int, device: torch.device) -> nn.Module:
    """Return torch.ao's quantizer: version 0 composes observer and operator, version 1 fuses them."""
    from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    kind = FakeQuantize if version == 0 else FusedMovingAvgObsFakeQuantize
    return kind(MovingAverageMinMaxObserver, quant_min=0, quant_max=STEPS, dtype=torch.quint8).to(device)


def torch_ao_layer(parts: tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU], version: int) -> nn.Module:
    """Return torch.ao's layer of convolution, BatchNorm and ReLU, and the quantizer of its output behind it."""
    from torch.ao.nn.intrinsic import ConvBnReLU2d
    from torch.ao.nn.intrinsic.qat import ConvBnReLU2d as QatConvBnReLU2d
    from torch.ao.quantization import get_default_qat_qconfig

    fused: Any = ConvBnReLU2d(*parts)
    fused.qconfig = get_default_qat_qconfig("fbgemm", version=version)
    return nn.Sequential(QatConvBnReLU2d.from_float(fused), fused.qconfig.activation())


def tritonq_layer(parts: tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]) -> tritonq.nn.ConvBnReLU2d:
    """Return tritonq's layer, which quantizes its output itself."""
    import tritonq

    fused: Any = tritonq.nn.intrinsic.ConvBnReLU2d(*parts)
    fused.qconfig = tritonq.get_qconfig("tensorrt")
    return cast(tritonq.nn.ConvBnReLU2d, tritonq.nn.ConvBnReLU2d.from_float(fused))
