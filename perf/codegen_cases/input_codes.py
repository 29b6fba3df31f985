"""Code-generation cases of inputs kept as codes of one byte: half of a 16-bit tensor's bytes, or a quarter."""

from __future__ import annotations

import torch

from tritonq.kernels import input_codes
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta, meta_grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType


def _encode(qtype: QuantizedType) -> Call:
    def call(dtype: torch.dtype) -> object:
        return input_codes.encode(meta(*LAYOUTS["flat"][0], dtype=dtype), meta_grid(qtype), True)

    return call


def _decode(qtype: QuantizedType) -> Call:
    def call(dtype: torch.dtype) -> object:
        shift = None if qtype is QINT8 else meta(1)
        codes = input_codes.InputCodes(meta(*LAYOUTS["flat"][0], dtype=torch.int8), meta(1), shift)
        return input_codes.decode(codes, dtype)

    return call


CASES = tuple(
    CodegenCase(f"input_codes_{name}/{kind}", make(qtype))
    for name, make in (("encode", _encode), ("decode", _decode))
    for kind, qtype in (("int8", QINT8), ("uint8", QUINT8))
)
