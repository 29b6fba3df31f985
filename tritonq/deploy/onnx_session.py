"""Sessions of ONNX Runtime with the options that exact integer sums need."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

_CPU_FLAGS = Path("/proc/cpuinfo")


@cache
def products_saturate() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate on this CPU: x86 without VNNI.

    Its kernels add two products in 16 bits there: 255·127 + 255·127 becomes 32767. False for CPUs other than x86; True
    for x86 if its flags can't be read, as on other systems than Linux.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = _CPU_FLAGS.read_text()
    except OSError:  # no Linux: unknown, and the option costs little
        return True
    return "vnni" not in flags


def open_session(model: bytes | str | os.PathLike[str], options: Any = None) -> Any:
    """Return a session of ONNX Runtime on the CPU, in which sums of 8-bit products are exact.

    On x86 without VNNI that takes the option ``session.x64quantprecision``.

    Args:
        model: the file's content, or its path.
        options: an ``onnxruntime.SessionOptions``, to which that option is added in place where the CPU needs it; None:
            default ones.

    Raises:
        ImportError: onnxruntime is not installed.
        Exception: what ONNX Runtime raises for a file that it can't read or run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions() if options is None else options
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
