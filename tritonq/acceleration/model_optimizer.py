"""A subclass of NVIDIA Model-Optimizer's ``TensorQuantizer`` that rounds by tritonq's operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType

# Below it Model-Optimizer takes a range for zero, and rounds everything to 0.
_SMALLEST_RANGE = 2.0**-24


class AcceleratedTensorQuantizer(TensorQuantizer):  # type: ignore[misc]
    """``TensorQuantizer`` for integer codes, with a calibrated range ``amax``, whose forward runs tritonq's operator.

    It gives ``clamp(round(x · b/amax), low, b) · amax/b`` with ``b = 2^(bits-1) - 1``, and ``low = -b`` for a narrow
    range, else ``-b - 1``; 0 where ``amax`` is at most 2^-24. That is Model-Optimizer's formula but for the order of
    two roundings, so that codes agree except at ties. During calibration, while it is switched off, for an empty input,
    and for settings that :func:`why_not` names, the library's own forward runs.
    """

    library_class = TensorQuantizer

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` rounded, as the class says, in its shape and dtype.

        The gradient is 1 everywhere if the library's ``_pass_through_bwd`` is set. Otherwise it is 1 where ``|x| <=
        amax``, and 0 elsewhere.
        """
        if why_not(self) is not None or self._disabled or self._if_calib or not self._if_quant or not inputs.numel():
            return cast(Tensor, super().forward(inputs))
        rounded = _Round.apply(inputs, self._amax, _qtype(self), self._pass_through_bwd)  # type: ignore[no-untyped-call]
        return cast(Tensor, rounded)


def why_not(quantizer: Any) -> str | None:
    """Return the first setting of ``quantizer`` that tritonq can't compute, such as ``"unsigned codes, …"``; else None.

    These settings are: floating-point codes; blocks, or a range of each batch; unsigned codes; a bias, a scale or a
    rotation before rounding; a backend of its own, packed values or a trained range; no calibrated range; a range over
    two or more axes. Whether it is switched off or being calibrated is not read.

    Args:
        quantizer: a ``TensorQuantizer``. Whether it is of a subclass is not checked.
    """
    if not isinstance(quantizer._num_bits, int):
        return f"floating-point codes {quantizer._num_bits}"
    if quantizer.block_sizes is not None or quantizer._dynamic:
        return "blocks, or a range of each batch"
    if quantizer._unsigned:
        return "unsigned codes, which it refuses negative values for"
    if quantizer.bias is not None or quantizer.pre_quant_scale is not None or quantizer.rotate_is_enabled:
        return "a bias, a scale or a rotation before rounding"
    if quantizer.backend is not None or not quantizer.fake_quant or quantizer._learn_amax:
        return "a backend of its own, packed values or a trained range"
    if not isinstance(getattr(quantizer, "_amax", None), Tensor):
        return "no calibrated range"
    axes = [axis for axis, size in enumerate(quantizer._amax.shape) if size != 1]
    return "a range over two axes" if len(axes) > 1 else None


def _qtype(quantizer: Any) -> QuantizedType:
    top = 2 ** (quantizer._num_bits - 1) - 1
    axes = [axis for axis, size in enumerate(quantizer._amax.shape) if size != 1]
    return QuantizedType(-top - (not quantizer._narrow_range), top, True, axes[0] if axes else None)


class _Round(torch.autograd.Function):
    """Round ``x`` to codes of ``qtype`` at the scale ``amax / quant_max``, ties to even.

    A range of at most 2^-24 rounds everything to 0. Gradients pass where ``|x| <= amax``; if ``passes`` they pass
    everywhere, and nothing is saved for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, qtype: QuantizedType, passes: bool) -> Tensor:
        if not passes:
            ctx.save_for_backward(x, amax)
        wide = amax.detach().float()
        scale = torch.where(wide <= _SMALLEST_RANGE, torch.finfo(torch.float32).max, wide / qtype.quant_max)
        values = x.float() if x.dtype == torch.float64 else x
        return as_dtype(fake_quantize(values, Grid(scale.reshape(-1), None, qtype)), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return dy, None, None, None
        x, amax = ctx.saved_tensors
        return torch.where(x.abs() <= amax, dy, 0), None, None, None
