"""The quantizer to a float format (FP8, for example) in a converted model."""

from __future__ import annotations

from torch import Tensor

from tritonq.deploy.quantizer import DeployedModule
from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType


class FloatQuantizer(DeployedModule):
    """Rounds values to the numbers of a float format, times one fixed scale or one per channel.

    No operation computes on its codes: modules that read its result compute in float, as with a
    :class:`tritonq.FloatFakeQuantize`.

    Args:
        qtype: the quantized type, with the float format.
        scale: float32, one element, or one per index of ``qtype.axis``; kept without a copy.

    Attributes:
        scale: float32, (1,) or (channels,).
        qtype: the quantized type, with the float format.
    """

    scale: Tensor

    def __init__(self, qtype: QuantizedType, scale: Tensor) -> None:
        super().__init__()
        self.qtype = qtype
        self.keep(scale=scale.reshape(-1))
        self.eval()

    def calculate_qparams(self) -> QParams:
        """Return the buffer ``scale`` itself, and new int32 zero points of its shape, all of which are 0."""
        return QParams(self.scale, self.scale.new_zeros(self.scale.shape).int())

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest number of the format to ``x / scale``, times ``scale``, in shape and dtype of ``x``.

        Values beyond the format's largest number become that number, also infinities; NaN stays NaN.
        """
        return fake_quantize(x, Grid(self.scale, None, self.qtype))

    def extra_repr(self) -> str:
        """Return the text for ``repr``: "e4m3, scale=0.02", or of several scales "e4m3, 2 scales along axis 1"."""
        if self.scale.numel() == 1:
            return f"{self.qtype.codes}, scale={self.scale.item():.6g}"
        return f"{self.qtype.codes}, {self.scale.numel()} scales along axis {self.qtype.axis}"
