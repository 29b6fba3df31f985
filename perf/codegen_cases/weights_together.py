"""Code-generation cases of all weights of a model in one launch: checked for spills alone."""

from __future__ import annotations

import torch

from tritonq.kernels import weights_together
from tritonq.perf.codegen_case import CodegenCase, meta, meta_grid, meta_range
from tritonq.quantized_type import QUINT8


def _together(dtype: torch.dtype) -> object:
    qtype, channels = QUINT8.with_axis(0), (512, 64)
    rows = [meta(512, 4608, dtype=dtype), meta(64, 9, dtype=dtype)]
    grids, ranges = [meta_grid(qtype, n) for n in channels], [meta_range(qtype, n) for n in channels]
    return weights_together.quantize_all(rows, meta(sum(channels)), grids, ranges)


CASES = (CodegenCase("weights_together", _together, dtypes=(torch.float32,)),)
