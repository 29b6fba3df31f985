"""Import triton-viz, whose newest version (3.0) was written for Triton 3.7, under the Triton that is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def import_triton_viz() -> ModuleType:
    """Return the module; skip the test where it or what it needs is not installed."""
    pytest.importorskip("z3", reason="triton-viz needs z3-solver and anytree")
    # Importing triton_viz would import its web page, and with it a web server.
    page = ModuleType("triton_viz.visualizer")
    page.launch = None  # type: ignore[attr-defined]
    sys.modules.setdefault("triton_viz.visualizer", page)
    # It looks these up on import. Triton 3.8 has no block pointers any more, and no kernel here uses them.
    for operation in ("make_block_ptr", "advance", "tensor_pointer_load", "tensor_pointer_store"):
        if not hasattr(InterpreterBuilder, f"create_{operation}"):
            setattr(InterpreterBuilder, f"create_{operation}", None)
    # Triton 3.8 negates, and compares floats, by operations that triton-viz does not know. These are those of 3.7.
    if hasattr(InterpreterBuilder, "create_fneg"):
        InterpreterBuilder.create_fneg = _subtract_from_zero
        InterpreterBuilder.create_minnumf = lambda builder, x, y: builder.binary_op(x, y, np.minimum)
        InterpreterBuilder.create_maxnumf = lambda builder, x, y: builder.binary_op(x, y, np.maximum)
    library: ModuleType = pytest.importorskip("triton_viz")
    # It rewrites the loops of all functions, and tells the module of the kernel alone of what it calls in them.
    from triton_viz.core import patch

    from tritonq.kernels import channel_tiles

    channel_tiles._triton_viz_loop_patcher = patch._loop_patcher  # type: ignore[attr-defined]
    return library


def trace_numbers(kernel: Any) -> Any:
    """Wrap a kernel so that an access out of bounds ends in SystemExit, with loop variables as numbers.

    The sanitizer itself takes them for symbols, of which it bounds the innermost of nested loops alone.
    """
    triton_viz = import_triton_viz()
    from triton_viz.clients import Sanitizer
    from triton_viz.core.callbacks import ForLoopCallbacks

    client = Sanitizer(abort_on_error=True)
    symbolic = client.register_for_loop_callback()
    numbers = ForLoopCallbacks(range_wrapper_factory=symbolic.range_wrapper_factory)
    client.register_for_loop_callback = lambda: numbers
    return triton_viz.trace(client)(kernel.function)


def _subtract_from_zero(builder: InterpreterBuilder, value: Any) -> Any:
    return builder.create_fsub(TensorHandle(np.zeros(1, np.float32), tl.float32), value)
