"""tritonq's implementations behind torch's own fake-quantize operators, for models that other libraries prepared."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from tritonq.functional.dispatch import implementation
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType

_DEVICES = ("CPU", "CUDA")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class use_in_torch:  # noqa: N801, as torch.no_grad: used like a function
    """Put tritonq's implementations behind torch's fake-quantize operators, on CPU and CUDA, until :meth:`remove`.

    Whatever calls these operators gains: torch.ao's FakeQuantize and FusedMovingAvgObsFakeQuantize, torchao's PT2E,
    your own scripts. Models, state dicts and results stay the same: outputs bit for bit where torch's are defined,
    gradients of values too, gradients of learned scales to the order of float sums (but for ties, which torch's
    backward per channel rounds in another way than its forward). What backward passes keep is what torch's keep.

    Calls that tritonq does not compute as torch does go to torch's own kernels: float64, float zero points, arguments
    that torch refuses, and, in the learnable per-tensor operator's backward, negative zero points. (On a GPU, zero
    points per channel that lie out of range are not looked for, since that would wait for the device.) Traced graphs
    (torch.compile, export) hold torch's operators as before and call tritonq's implementations when they run, unless
    the compiler has made a kernel of its own of them. Some calls that torch's operators fail in are computed (empty
    tensors, learned scales in 16 bits); an empty tensor's gradients of scales are 0. A batch with NaN or infinities is
    left out of a running range; torch's own operator would take it in for good.

    torch's dispatcher is one for the process: other threads see the change too. Uses can be nested; the last one to be
    removed takes everything back.

    Attributes:
        operators: names of the operators that are overridden, as in ``torch.ops.aten``. torch composes others of them,
            ``fake_quantize_per_tensor_affine`` and ``fused_moving_avg_obs_fake_quant`` among them.

    Examples:
        >>> import tritonq
        >>> with tritonq.use_in_torch() as active:
        ...     y = torch.fake_quantize_per_tensor_affine(torch.tensor([0.26]), 0.5, 0, -8, 7)
        >>> y, "fake_quantize_per_tensor_affine_cachemask" in active.operators
        (tensor([0.5000]), True)
    """

    def __init__(self) -> None:
        self.operators = tuple(_IMPLEMENTATIONS)
        self._is_active = True
        _Registration.enter()

    def remove(self) -> None:
        """End this use, as the end of a ``with`` block does; a second call does nothing.

        torch gets its own kernels back if no other use is active.
        """
        if self._is_active:
            self._is_active = False
            _Registration.leave()

    def __enter__(self) -> use_in_torch:
        if not self._is_active:  # a second block with the same object
            self._is_active = True
            _Registration.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._is_active else "removed"
        return f"use_in_torch({state}; {', '.join(self.operators)})"


class _Registration:
    """The one registration with torch's dispatcher, and a count of the :class:`use_in_torch` that share it."""

    _lock = threading.Lock()
    _uses = 0
    _library: Any = None

    @classmethod
    def enter(cls) -> None:
        with cls._lock:
            if cls._uses == 0:
                cls._library = _register()
            cls._uses += 1

    @classmethod
    def leave(cls) -> None:
        with cls._lock:
            cls._uses -= 1
            if cls._uses == 0:
                cls._library._destroy()
                cls._library = None


def _register() -> Any:
    library: Any = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel is overridden is what the user asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for operator, make in _IMPLEMENTATIONS.items():
            for device in _DEVICES:
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", device):
                    own = torch.library.get_kernel(f"aten::{operator}", device)
                    library.impl(operator, make(own), device, with_keyset=True, allow_override=True)
    return library


def _is_ours(x: Tensor, quant_min: int, quant_max: int) -> bool:
    """Whether tritonq computes a call with this tensor and this range of codes as torch does.

    It does for float32, float16 and bfloat16 and ``quant_min < quant_max``. If not, torch's own kernel runs.
    """
    return x.dtype in _DTYPES and quant_min < quant_max


def _are_qparams(scale: Tensor, zero_point: Tensor, count: int | None) -> bool:
    """Whether scale and zero point have the dtypes of a grid and ``count`` elements; count None: one element.

    The scale is float32, the zero point int32, or as one element int64.
    """
    integers = (torch.int32, torch.int64) if count is None else (torch.int32,)
    right = scale.dtype == torch.float32 and zero_point.dtype in integers
    length = 1 if count is None else count
    return right and scale.numel() == zero_point.numel() == length


def _grid(
    scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None, enabled: Any = None
) -> Grid:
    qtype = QuantizedType(quant_min, quant_max, False, axis)
    enabled = None if enabled is None else enabled.to(torch.uint8)
    return Grid(scale.detach().reshape(-1), zero_point.detach().reshape(-1).to(torch.int32), qtype, enabled)


def _grid_of_numbers(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Grid:
    zero = torch.full((1,), zero_point, dtype=torch.int32, device=x.device) if zero_point else None
    scales = torch.full((1,), scale, dtype=torch.float32, device=x.device)
    return Grid(scales, zero, QuantizedType(quant_min, quant_max, False))


def _ops(x: Tensor) -> ModuleType:
    return implementation("fake_quant", x)


def _is_per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> bool:
    if not _is_ours(x, quant_min, quant_max) or not 0 <= axis < x.dim():
        return False
    # torch refuses zero points out of range, and waits for a GPU to tell; tritonq doesn't wait.
    return _are_qparams(scale, zero_point, x.shape[axis]) and (
        not is_readable(zero_point)
        or not zero_point.numel()
        or bool(quant_min <= zero_point.amin() <= zero_point.amax() <= quant_max)
    )


# Each of the following makes the implementation of one operator from torch's own kernel. Arguments are those of the
# operator's schema in torch, behind the dispatcher's keys; it leaves out trailing ones that have their defaults.


def _masked_per_tensor(own: Any) -> Callable[..., Any]:
    def kernel(keys: Any, x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Any:
        if _is_ours(x, quant_min, quant_max) and quant_min <= zero_point <= quant_max and scale > 0:
            return _ops(x).fake_quantize_with_mask(x, _grid_of_numbers(x, scale, zero_point, quant_min, quant_max))
        return own.call_boxed(keys, x, scale, zero_point, quant_min, quant_max)

    return kernel


def _masked_per_tensor_of_tensors(own: Any) -> Callable[..., Any]:
    def kernel(
        keys: Any, x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, quant_min: int, quant_max: int
    ) -> Any:
        if _is_ours(x, quant_min, quant_max) and _are_qparams(scale, zero_point, None):
            return _ops(x).fake_quantize_with_mask(x, _grid(scale, zero_point, quant_min, quant_max, None, enabled))
        return own.call_boxed(keys, x, scale, zero_point, enabled, quant_min, quant_max)

    return kernel


def _masked_per_channel(own: Any) -> Callable[..., Any]:
    def kernel(
        keys: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
    ) -> Any:
        if _is_per_channel(x, scale, zero_point, axis, quant_min, quant_max):
            return _ops(x).fake_quantize_with_mask(x, _grid(scale, zero_point, quant_min, quant_max, axis))
        return own.call_boxed(keys, x, scale, zero_point, axis, quant_min, quant_max)

    return kernel


def _learnable(per_channel: bool) -> Callable[[Any], Callable[..., Any]]:
    def make(own: Any) -> Callable[..., Any]:
        def kernel(keys: Any, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Any:
            axis, codes, grad_factor = _learned_arguments(rest, per_channel)
            grid = _learned_grid(x, scale, zero_point, axis, *codes)
            if grid is None:
                return own.call_boxed(keys, x, scale, zero_point, *rest[:per_channel], *codes, grad_factor)
            return implementation("learned_scale", x).learned_fake_quantize(x, grid, "torch")

        return kernel

    return make


def _learnable_backward(per_channel: bool) -> Callable[[Any], Callable[..., Any]]:
    def make(own: Any) -> Callable[..., Any]:
        def kernel(keys: Any, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Any:
            axis, codes, grad_factor = _learned_arguments(rest, per_channel)
            grid = _learned_grid(x, scale, zero_point, axis, *codes)
            # Of one negative zero point torch's backward takes another integer than its forward.
            if grid is None or (not per_channel and float(zero_point) < 0):
                return own.call_boxed(keys, dy, x, scale, zero_point, *rest[:per_channel], *codes, grad_factor)
            return _learned_gradients(dy, x, grid, scale, zero_point, grad_factor)

        return kernel

    return make


def _learned_arguments(rest: tuple[Any, ...], per_channel: bool) -> tuple[int | None, tuple[int, int], float]:
    """Return axis, ``(quant_min, quant_max)`` and gradient factor from a learnable operator's last arguments, ``rest``.

    They are an axis, if ``per_channel``, the two codes, and perhaps the factor. That is 1 unless given, and the axis
    None for the operator per tensor.
    """
    quant_min, quant_max, *given = rest[per_channel:]
    return rest[0] if per_channel else None, (quant_min, quant_max), given[0] if given else 1.0


def _learned_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int
) -> Grid | None:
    """Return the grid of a learnable operator's arguments; None: tritonq does not compute this call.

    Scale and zero point must be float32, one element or one per channel; the zero point is rounded and clamped.
    """
    if not _is_ours(x, quant_min, quant_max) or (axis is not None and not 0 <= axis < x.dim()):
        return None
    channels = 1 if axis is None else x.shape[axis]
    if not scale.dtype == zero_point.dtype == torch.float32 or not scale.numel() == zero_point.numel() == channels:
        return None
    return _grid(scale, zero_point.round().clamp(quant_min, quant_max), quant_min, quant_max, axis)


def _learned_gradients(
    dy: Tensor, x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    ops = implementation("learned_scale", x)
    dx, dscale, dzero_point = ops.learned_fake_quantize_backward(dy, x, grid, "torch")
    return dx, dscale.mul_(grad_factor).view_as(scale), dzero_point.mul_(grad_factor).view_as(zero_point)


def _fused_helper(own: Any) -> Callable[..., Any]:
    def kernel(keys: Any, x: Tensor, observer_on: Tensor, fake_quant_on: Tensor, *state: Any) -> Any:
        arguments = _with_flags(state)
        grid = _observed_grid(x, observer_on, fake_quant_on, *arguments)
        if grid is None:
            return own.call_boxed(keys, x, observer_on, fake_quant_on, *arguments)
        return _ops(x).fake_quantize_with_mask(x, grid)

    return kernel


def _with_flags(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the fused operator's arguments with its two flags at the end.

    The dispatcher leaves out those that are False.
    """
    return (*arguments, *(False,) * (10 - len(arguments)))


@torch.no_grad()
def _observed_grid(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    axis: int,
    per_row: bool,
    symmetric: bool,
) -> Grid | None:
    """Update running range, scale and zero point in place as torch's fused operator does, and return the grid.

    The range is a moving average of minima and maxima, and the rule ``"torch_v1"``; while ``observer_on`` is 0 nothing
    changes. None: tritonq does not compute this call, and nothing was changed.
    """
    channels = x.shape[axis] if per_row and 0 <= axis < x.dim() else 1
    state = (running_min, running_max, scale, zero_point)
    if (
        not _is_ours(x, quant_min, quant_max)
        or x.numel() == 0
        or (per_row and not 0 <= axis < x.dim())
        or any(t.numel() != channels or not t.is_contiguous() for t in state)
        or zero_point.dtype != torch.int32
        or any(t.dtype != torch.float32 for t in state[:3])
    ):
        return None
    qtype = QuantizedType(quant_min, quant_max, symmetric, axis if per_row else None)
    shape = (channels,) if per_row else ()
    statistics = RangeStatistics(
        running_min.view(shape),
        running_max.view(shape),
        torch.zeros((), dtype=torch.int64, device=x.device),
        qtype.granularity,
        observer_on.to(torch.uint8),
        averaging_constant=averaging_constant,
        rule="torch_v1",
    )
    implementation("min_max", x).observe(x, statistics, Grid(scale.view(-1), zero_point.view(-1), qtype))
    return _grid(scale, zero_point, quant_min, quant_max, qtype.axis, fake_quant_on)


_IMPLEMENTATIONS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "fake_quantize_per_tensor_affine_cachemask": _masked_per_tensor,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _masked_per_tensor_of_tensors,
    "fake_quantize_per_channel_affine_cachemask": _masked_per_channel,
    "_fake_quantize_learnable_per_tensor_affine": _learnable(per_channel=False),
    "_fake_quantize_learnable_per_tensor_affine_backward": _learnable_backward(per_channel=False),
    "_fake_quantize_learnable_per_channel_affine": _learnable(per_channel=True),
    "_fake_quantize_learnable_per_channel_affine_backward": _learnable_backward(per_channel=True),
    "_fused_moving_avg_obs_fq_helper": _fused_helper,
}
