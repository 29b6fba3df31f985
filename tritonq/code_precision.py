"""Which float dtypes can hold the codes of a grid apart, and what quantizers do with other inputs in eval mode.

A dtype of p significant bits holds ``steps · scale``, rounded, within half a step for up to ``2^(p - 1)`` steps from
the zero point: bfloat16 128 of them, float16 1024. Beyond that it merges neighbours: of the values of an unsigned 8-bit
grid in bfloat16, 17 % are nearer to another code than to their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonq.quantized_type import QuantizedType
from tritonq.warn_once import warn_once

_PRECISIONS = {torch.bfloat16: 8, torch.float16: 11}


def tells_codes(dtype: torch.dtype, qtype: QuantizedType) -> bool:
    """Whether each value of a grid of type ``qtype``, rounded to ``dtype``, is still nearest to its own code.

    True for float32, float64 and float formats. For bfloat16 (p = 8) and float16 (p = 11) the codes may lie up to
    ``2^(p - 1)`` from the zero point, or, if the type leaves the zero point open, from each other.

    Examples:
        >>> from tritonq.quantized_type import QINT8, QUINT8
        >>> tells_codes(torch.bfloat16, QINT8), tells_codes(torch.bfloat16, QUINT8), tells_codes(torch.float16, QUINT8)
        (True, False, True)
    """
    bits = _PRECISIONS.get(dtype)
    if bits is None or qtype.float_format is not None:
        return True
    low, high, zero = qtype.quant_min, qtype.quant_max, qtype.fixed_zero_point
    steps = high - low if zero is None else max(abs(low - zero), abs(high - zero))
    return steps <= 1 << (bits - 1)


def to_hold_codes(x: Tensor, qtype: QuantizedType, quantizer: nn.Module) -> Tensor:
    """Return the input ``x`` of a quantizer in eval mode, as float32 if it is bfloat16 or float16 under autocast.

    Layers under autocast take any dtype. Elsewhere ``x`` itself is returned; if its dtype can't hold all codes apart
    (:func:`tells_codes`), a UserWarning says so, but not while ``torch.compile`` traces.

    Args:
        x: any float tensor.
        qtype: the codes to which ``quantizer`` rounds.
        quantizer: the module that is called; it warns once.
    """
    if x.dtype not in _PRECISIONS:
        return x
    if torch.is_autocast_enabled(x.device.type):
        return x.float()
    if not torch.compiler.is_compiling() and not tells_codes(x.dtype, qtype):
        name = str(x.dtype).removeprefix("torch.")
        warn_once(
            quantizer,
            f"{name} merges neighbouring codes {qtype.quant_min}..{qtype.quant_max}: layers may read another code than "
            "their quantizer chose; evaluate the model in float32, or under torch.autocast",
            stacklevel=4,
        )
    return x
