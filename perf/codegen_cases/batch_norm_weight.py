"""Code-generation cases of a step's weight with its BatchNorm: small, so that they are checked for spills alone."""

from __future__ import annotations

import torch

from tritonq.kernels import batch_norm_weight
from tritonq.perf.codegen_case import Call, CodegenCase, meta, meta_grid, meta_range
from tritonq.perf.codegen_cases.weight import WEIGHTS
from tritonq.quantized_type import QINT8, QuantizedType

_OUT = 512


def _step(length: int, qtype: QuantizedType) -> Call:
    """Return a call that computes the weight of a step with BatchNorm, and its gradient."""

    def call(dtype: torch.dtype) -> object:
        rows, vector, scales = meta(_OUT, length), meta(_OUT), () if qtype.axis is None else (_OUT,)
        state = (meta_grid(qtype, *scales), meta_range(qtype, *scales))
        made = batch_norm_weight.quantize(rows, vector, vector, 1e-5, dtype, torch.float32, *state)
        vectors = (vector, vector, vector, vector, vector, vector)
        return batch_norm_weight.gradients(made[0], rows, *vectors, made[-1], True)

    return call


CASES = tuple(
    CodegenCase(f"batch_norm_weight/{kind}", _step(length, qtype), dtypes=(torch.bfloat16,))
    for kind, (length, qtype) in (
        *((kind, (length, qtype.with_axis(0))) for kind, (length, qtype) in WEIGHTS.items()),
        ("per tensor", (64, QINT8)),  # whose range needs the factors first
    )
)
