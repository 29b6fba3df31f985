"""Training steps as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.learned_base import LearnedFakeQuantize
from tritonq.warn_once import warn_once

# Replaced where tests stand in for a GPU.
_DEVICE = "cuda"

M = TypeVar("M", bound=nn.Module)


def graphed(model: M, example_inputs: Tensor | Sequence[Tensor], *, warmup_steps: int = 3) -> M:
    """Let ``model`` run its forward and backward pass as CUDA graphs, and return it.

    :func:`torch.cuda.make_graphed_callables` captures the passes. A captured pass costs the CPU one launch, so that
    small batches are no longer bound by the time that Python and launches take. Around torch's function this one

    - restores all values after the warm-up steps: ranges, statistics of BatchNorm, counters, first learned scales;
    - marks the buffers as changed with each replay, which torch doesn't, so that what is derived from them in eval
      mode is derived anew;
    - runs the model without graphs, and warns once, where inputs differ from ``example_inputs`` in number, shape (a
      smaller last batch), dtype, device, strides or ``requires_grad``, are no tensors or are given by keyword, or where
      autocast is on or off, or casts to a dtype, other than during the capture;
    - runs the first call in the captured mode without graphs: it replaces ranges that ``prepare_qat`` took from inputs;
    - runs the model without graphs in the other mode, train or eval: validation needs no second model.

    Optimizer, loss and gradient scaling stay outside. Parameters must stay where they are: load checkpoints with
    ``load_state_dict``, which copies, and call this after ``model.to(...)`` and before wrapping in
    ``DistributedDataParallel``. Switches (``disable_observer``, ``freeze_bn_stats``, ...) that are buffers take
    effect in the graph; others, such as ``requires_grad_``, need another capture.

    Args:
        model: a module on one CUDA device, in the mode to capture, train or eval; its ``forward`` is replaced.
        example_inputs: a tensor or positional arguments, all of them tensors on that device, of the shapes to train
            with. Their values are used by the warm-up steps alone.
        warmup_steps: steps before the capture, at least 1: kernels are compiled and tuned in them.

    Returns:
        ``model``. ``copy.deepcopy`` of it runs without graphs. It can't be pickled: save its ``state_dict``.

    Raises:
        ValueError: parameters, buffers or inputs are not on one CUDA device; an input is no tensor, or there is none;
            fewer than one warm-up step; or the model is graphed already.
        AssertionError: ``model`` itself has hooks, or a buffer requires a gradient; torch raises it.
        RuntimeError: a pass can't be captured, such as one that reads a value of the GPU on the host.

    Source: torch.cuda.make_graphed_callables, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    Examples:
        >>> import tritonq
        >>> model = tritonq.prepare_qat(torch.nn.Sequential(torch.nn.Linear(4, 2)), example_inputs=torch.randn(3, 4))
        >>> if torch.cuda.is_available():
        ...     x = torch.randn(3, 4, device="cuda")
        ...     _ = tritonq.graphed(model.cuda(), x)(x).sum().backward()
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    _check(model, inputs, warmup_steps)
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize | LearnedFakeQuantize)]
    waiting = [quantizer for quantizer in quantizers if quantizer.begins_with_next_batch()]
    saved = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers() if name not in saved}
    eager, own = model.forward, model.__dict__.get("forward")
    capture = _autocast()
    try:
        with capture.context():
            torch.cuda.make_graphed_callables(model, inputs, num_warmup_iters=warmup_steps)
    except BaseException:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own
        raise
    finally:
        model.load_state_dict(saved, strict=False)
        for buffer, value in buffers.values():
            buffer.copy_(value)
        for quantizer in waiting:
            quantizer.begin_with({**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())})
    model.forward = _GraphedForward(model, eager, model.forward, inputs, capture)
    return model


class _Autocast:
    """The state of autocast on the CUDA device: whether it casts, and to which dtype."""

    def __init__(self, enabled: bool, dtype: torch.dtype) -> None:
        self._state = (enabled, dtype if enabled else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Autocast) and self._state == other._state

    __hash__ = None  # type: ignore[assignment]

    def context(self) -> AbstractContextManager[Any]:
        """Return a context manager that casts as this state says, without autocast's cache of cast weights.

        A graph would keep the cached weights from step to step. If autocast was off, the context does nothing.
        """
        enabled, dtype = self._state
        return torch.autocast("cuda", dtype=dtype, cache_enabled=False) if enabled else nullcontext()


def _autocast() -> _Autocast:
    return _Autocast(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))


class _GraphedForward:
    """The forward of a graphed model.

    It replays the captured graph if the model is in the mode of the capture, inputs are positional tensors of the same
    layouts, and autocast is in the same state. Otherwise, and in its first call, it runs the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        eager: Callable[..., Any],
        replay: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        autocast: _Autocast,
    ) -> None:
        self._model, self._eager, self._replay = model, eager, replay
        self._training, self._autocast = model.training, autocast
        self._layouts = [_layout(x) for x in inputs]
        # The first step replaces the ranges that example inputs gave, which later ones don't.
        self._is_first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._model.training != self._training:
            return self._eager(*args, **kwargs)
        if self._is_first:
            self._is_first = False
            return self._eager(*args, **kwargs)
        why = self._misfit(args, kwargs)
        if why is not None:
            warn_once(self, f"a graphed {type(self._model).__name__} runs without its graph: {why}", stacklevel=3)
            return self._eager(*args, **kwargs)
        torch.autograd.graph.increment_version(list(self._model.buffers()))
        return self._replay(*args)

    def _misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return in words why a call can't replay the graph; None if it can."""
        if kwargs or not all(isinstance(x, Tensor) for x in args):
            return "it was captured with positional tensors"
        layouts = [_layout(x) for x in args]
        if layouts != self._layouts:
            return f"it was captured for {_told(self._layouts)}, and got {_told(layouts)}"
        if _autocast() != self._autocast:
            return "autocast is in another state than during the capture"
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Return the plain forward of the model's copy: the graph works on the original's tensors."""
        copied: Callable[..., Any] = copy.deepcopy(self._eager, memo)
        return copied

    def __reduce__(self) -> Any:
        raise TypeError("a graphed model can't be pickled, since graphs belong to a process; save its state_dict()")


def _layout(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape), x.dtype, x.device, x.stride(), x.requires_grad)


def _told(layouts: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{dtype} {shape} with strides {stride}" for shape, dtype, _, stride, _ in layouts)


def _check(model: nn.Module, inputs: tuple[Any, ...], warmup_steps: int) -> None:
    """Raise a ValueError if the model or its inputs can't be captured.

    That is so if the model is graphed already, steps are fewer than one, an input is no tensor or there is none, or
    parameters, buffers and inputs are not all on one CUDA device.
    """
    if isinstance(model.__dict__.get("forward"), _GraphedForward):
        raise ValueError(f"this {type(model).__name__} is graphed already")
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError("example_inputs must be tensors; a graph has no other inputs")
    devices = {x.device for x in (*model.parameters(), *model.buffers(), *inputs)}
    if len(devices) != 1 or next(iter(devices)).type != _DEVICE:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"graphed needs a model and inputs on one CUDA device; these are on {names}")
