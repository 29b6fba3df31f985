"""How quantized tensors travel between the modules of a model in eval mode: as codes, beside or instead of values.

A module that computes on codes does three things::

    if can_use_codes(x):  # else it computes on float values
        codes = take_codes(x, source)  # those that x carries, or new ones made from its values
        if codes is not None:
            return give_codes(table[codes.long()], output, like=x)  # a float tensor that carries its codes

Codes are uint8 and counted from 0: a quantizer's own code minus its ``quant_min``. Their values are
``(code - grid.zero) · grid.scale``. ``source`` and ``output`` are grids as numbers on the host (`HostGrid`), whose
``zero`` is counted from 0 too; `host_grid` makes them, once for each version of their tensors (`memo.Memo`).

A tensor *carries* its codes in an attribute. Inside a converted model :func:`give_codes` computes no values at all: the
tensor stores codes until something reads it (`coded_tensor`). :func:`carry_codes` marks the model whose calls do so;
what such a call returns are ordinary tensors again.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tritonq.backend import select, without_kernel
from tritonq.functional.coded_tensor import CodedTensor, coded_like, memory_format_of
from tritonq.functional.host_grid import HostGrid
from tritonq.reference.eval_codes import CodeRange

_MARK = "_tritonq_codes"
# More float32 values than the first, on their way to codes, are computed a few images at a time, up to the second:
# 4 MB, and 2 MB, which stay in the cache of a core and in memory that the process keeps.
_MAX_VALUES_AT_ONCE = 2**20
_VALUES_AT_ONCE = 2**19


class _Calls(threading.local):
    """A count, per thread, of the calls now running of models that :func:`carry_codes` prepared."""

    depth = 0


_calls = _Calls()


def carry_codes(model: nn.Module) -> nn.Module:
    """Store tensors between the modules of ``model`` as codes during its calls; returns ``model``.

    ``model``, a converted one, gets a forward pre-hook and a forward hook, which its copies and pickles keep. What it
    returns are ordinary float tensors.
    """
    model.register_forward_pre_hook(open_call_hook, prepend=True)
    model.register_forward_hook(close_call_hook, always_call=True)
    return model


def open_call_hook(module: nn.Module, args: Any) -> None:
    """Count, per thread, that a call of a model prepared by :func:`carry_codes` begins: the model's forward pre-hook.

    While a call is counted, :func:`give_codes` returns tensors that store codes. A graph that is traced counts nothing.
    """
    if not torch.compiler.is_compiling():
        _calls.depth += 1


def close_call_hook(module: nn.Module, args: Any, result: Any) -> Any:
    """Count that a call of a model prepared by :func:`carry_codes` ends: the model's forward hook.

    Returns:
        ``result``, what the model returned, with a float tensor in place of each CodedTensor, in tuples, lists and
        dicts too; None, with which torch keeps the result, while ``torch.compile`` traces.
    """
    if torch.compiler.is_compiling():
        return None
    _calls.depth = max(0, _calls.depth - 1)
    return tree_map(_ordinary, result)


def _ordinary(x: Any) -> Any:
    return x.as_float() if type(x) is CodedTensor else x


def can_use_codes(x: Tensor) -> bool:
    """Whether a module may compute on the codes of ``x`` instead of its values.

    That is so for float32 tensors on the CPU that need no gradient and that Triton kernels do not run on, while nothing
    traces, transforms or watches the operators: no ``torch.compile``, ``torch.jit.trace``, ``torch.func`` and no
    dispatch mode. Of subclasses of Tensor only `CodedTensor` is taken.

    Raises:
        RuntimeError: ``use_backend("triton")`` is active, and no kernel can run on ``x``.
    """
    if torch.compiler.is_compiling():
        return False
    if type(x) is CodedTensor:
        held = x.codes
        x = x.to_float() if held is None else held
    elif type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
        return False
    return (
        not (torch.is_grad_enabled() and x.requires_grad)
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and select(x) != "triton"
    )


def carried_codes(x: Tensor) -> tuple[Tensor, HostGrid] | None:
    """Return the uint8 codes that a tensor carries, not copied, and their grid; None without any, or if it was changed.

    A CodedTensor carries the codes that it stores.
    """
    if type(x) is CodedTensor:
        held = x.codes
        return None if held is None else (held, x.grid)
    carried = getattr(x, _MARK, None)
    return None if carried is None or carried[1] != x._version else (carried[2], carried[0])


def take_codes(x: Tensor, grid: HostGrid) -> Tensor | None:
    """Return the codes of ``x`` on ``grid``, uint8: those it carries, else ``round(x / scale) + zero``, ties to even.

    The result is None if a rounded value is no code in ``0..grid.largest`` or a value is NaN. If ``x`` carries codes on
    another grid, its values are rounded. An empty tensor has empty codes. Carried codes are returned without a copy.

    Args:
        x: a tensor that :func:`can_use_codes` accepts.
        grid: the grid of its values.
    """
    carried = carried_codes(x)
    if carried is not None and carried[1] == grid:
        return carried[0]
    if type(x) is CodedTensor:
        x = x.to_float()
    if not x.numel():
        return x.to(torch.uint8)
    codes: Tensor | None = without_kernel("eval_codes", x).codes_of_values(
        x, grid.scale, code_range(grid), grid.largest
    )
    return codes


def give_codes(codes: Tensor, grid: HostGrid, like: Tensor) -> Tensor:
    """Return ``(codes - grid.zero) · grid.scale`` as float32; it carries ``codes`` for the next :func:`take_codes`.

    Inside a call of a model that :func:`carry_codes` prepared, the result is a `CodedTensor`, whose values are computed
    when something reads them. Outside of one, in ``torch.inference_mode``, the result carries no codes.

    Args:
        codes: uint8 on the CPU, counted from 0, up to ``grid.largest``; kept without a copy: don't change them later.
        grid: their grid.
        like: the module's input. The result is channels_last if ``like`` is and has as many axes, else contiguous.
    """
    if _calls.depth:
        return coded_like(codes, like, grid)
    form = memory_format_of(like) if codes.dim() == like.dim() else torch.contiguous_format
    values: Tensor = without_kernel("eval_codes", codes).values_of_codes(codes, grid.scale, grid.zero, form)
    if not values.is_inference():
        setattr(values, _MARK, (grid, values._version, codes))
    return values


def quantize_to_codes(x: Tensor, grid: HostGrid) -> Tensor | None:
    """Round a tensor to ``grid``: return ``(code - zero) · scale`` as float32, with codes as :func:`give_codes` does.

    ``code = clip(round(x / scale) + zero)``, where ``x / scale`` is ``x · (1 / scale)`` if ties go to even, as in
    `fake_quantize`. The result is None if ``x`` has a NaN or no element. A CodedTensor on the same grid is returned
    itself.

    Args:
        x: a tensor that :func:`can_use_codes` accepts.
        grid: the grid to round to.
    """
    if type(x) is CodedTensor:
        if x.codes is not None and x.grid == grid:
            return x
        x = x.to_float()
    if not x.numel():
        return None
    codes = without_kernel("eval_codes", x).codes_of_values(x, grid.scale, code_range(grid), None)
    return None if codes is None else give_codes(codes, grid, x)


def images_at_once(values: int, images: int) -> int:
    """Return how many images of a batch to compute at once, so that their float32 values fit into a cache (2 MiB).

    All of them if the batch has up to 4 MiB of values; one, if a single image is larger than the cache.

    Args:
        values: float32 values per image.
        images: images in the batch.
    """
    return images if values * images <= _MAX_VALUES_AT_ONCE else min(images, max(1, _VALUES_AT_ONCE // values))


def code_range(grid: HostGrid, low: int = 0, high: int | None = None, largest_step: float = math.inf) -> CodeRange:
    """Return how steps (values over the scale) become codes of a grid: ``clip(round(step) + grid.zero, low, high)``.

    Args:
        grid: gives the code of the value 0 and how ties are rounded.
        low: smallest code that steps may become, counted from 0.
        high: largest one, or the grid's largest code if that is smaller; None: the grid's.
        largest_step: largest absolute value of a step, noted in the result; infinity if unknown. A small one lets codes
            be computed in one pass, to the same codes.
    """
    high = grid.largest if high is None else min(high, grid.largest)
    return CodeRange(grid.zero, low, high, grid.half_even, largest_step)


def rounded_codes(steps: Tensor, grid: HostGrid) -> Tensor:
    """Return uint8 ``clip(round(steps) + grid.zero, 0, grid.largest)`` of values over the scale; overwrites ``steps``.

    ``steps`` are float32, finite and on the CPU; ``grid.half_even`` says how ties are rounded.
    """
    codes: Tensor = without_kernel("eval_codes", steps).codes_of_steps(steps, code_range(grid))
    return codes
