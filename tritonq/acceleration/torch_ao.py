"""Modules of torch.ao's eager quantization-aware training, computed by tritonq's operators.

A module that is accelerated stays of the library's class, which exact comparisons in the library and in scripts look
for (``type(module) in {ConvBn2d, …}``), and has a mark of its own. Importing this file puts a function before the
forward of every class that it knows: it looks for the mark, and runs the library's forward without one.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.nn.intrinsic import qat as intrinsic
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.fake_quantize import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
)

from tritonq.acceleration.library_layers import HOOK, MARK, RELU, BatchNorm, Layer, add, affine, normalized
from tritonq.acceleration.quantizers import can_compute, quantize
from tritonq.functional.recomputation import forget_step_memory, step_memory_of
from tritonq.nn.batch_norm import batch_norm_state, is_plain
from tritonq.nn.qat import linear_map_of

_QUANTIZERS = (FakeQuantize, FusedMovingAvgObsFakeQuantize, FixedQParamsFakeQuantize, _LearnableFakeQuantize)
# The ceiling of the ReLU in each class of layers.
_LAYERS: dict[type[nn.Module], float | None] = {
    qat.Conv1d: None,
    qat.Conv2d: None,
    qat.Conv3d: None,
    qat.Linear: None,
    intrinsic.ConvReLU1d: RELU,
    intrinsic.ConvReLU2d: RELU,
    intrinsic.ConvReLU3d: RELU,
    intrinsic.LinearReLU: RELU,
    intrinsic.ConvBn1d: None,
    intrinsic.ConvBn2d: None,
    intrinsic.ConvBn3d: None,
    intrinsic.ConvBnReLU1d: RELU,
    intrinsic.ConvBnReLU2d: RELU,
    intrinsic.ConvBnReLU3d: RELU,
    intrinsic.LinearBn1d: None,
}
CLASSES: frozenset[type[nn.Module]] = frozenset((*_QUANTIZERS, *_LAYERS, FloatFunctional))
_Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Mark:
    """Mark of an accelerated module. Unpickling it imports this file, so that the module runs tritonq's operators."""


def mark(module: nn.Module) -> None:
    """Let tritonq compute ``module``: set its attribute ``MARK``.

    Its class must be one of ``CLASSES``, those whose methods look for the mark (not checked).
    """
    module.__dict__[MARK] = Mark()


def unmark(module: nn.Module) -> None:
    """Let the library compute ``module`` again: remove its attribute ``MARK``.

    What the module keeps for steps that activation checkpointing runs again is deleted, too.
    """
    module.__dict__.pop(MARK, None)
    forget_step_memory(module)


def run_with(layer: nn.Module, x: Tensor, output_quantizer: nn.Module | None) -> Tensor:
    """Return the result of a marked layer for ``x``; rounded by ``output_quantizer`` unless that is None.

    Without BatchNorm it is ``relu?(op(x, FQ(W)) + b)``. With one, and ``s = γ/sqrt(running_var + eps)``, it is
    ``relu?(BN(op(x, FQ(W s)) / s + b))`` if the BatchNorm is in training mode (torch.ao's slow path folds the updated
    running variance: :func:`normalized`), and ``relu?(op(x, FQ(W s)) + β + (b - running_mean) s)`` if it is in eval
    mode, as frozen ones are. Quantizers that observe update their ranges in place, as a training step does running
    statistics. A layer whose BatchNorm isn't plain (:func:`is_plain`: another class, hooks, synchronized over ranks) is
    computed by the library's forward.
    """
    held = cast(Any, layer)
    if "bn" in held._modules and not is_plain(held.bn):
        y = _PLAIN[type(layer)](layer, x)
        return y if output_quantizer is None else cast(Tensor, output_quantizer(y))
    memory = step_memory_of(layer)
    grouping = (getattr(held, "transposed", False), getattr(held, "groups", 1))
    ceiling = _LAYERS[type(layer)]
    computed = Layer(linear_map_of(held), held.weight_fake_quant, output_quantizer, ceiling, grouping, memory)
    norm = _batch_norm(held)
    if norm is None:
        return affine(computed, x, held.weight, held.bias)
    return normalized(computed, x, held.weight, held.bias, norm)


def _batch_norm(held: Any) -> BatchNorm | None:
    """Return the BatchNorm of the layer ``held`` with its tensors, or None without one.

    In training, ``num_batches_tracked`` counts one more batch, on which a cumulative momentum depends.
    """
    if "bn" not in held._modules:
        return None
    bn = held.bn
    training, momentum = bn.training, bn.momentum
    corrected = getattr(held, "_enable_slow_path_for_better_numerical_stability", False)
    if training:
        momentum = batch_norm_state(bn).momentum
    return BatchNorm(*(bn.weight, bn.bias, bn.running_mean, bn.running_var, momentum, bn.eps, training, corrected))


def _run_layer(plain: _Forward, self: nn.Module, x: Tensor) -> Tensor:
    """Return the result of a marked layer; observed and rounded if tritonq took its observer hook over.

    Args:
        plain: the library's own forward.
        self: the layer.
        x: its input.
    """
    held: Any = self
    return run_with(self, x, held.activation_post_process if HOOK in self.__dict__ else None)


def _run_quantizer(plain: _Forward, self: nn.Module, x: Tensor) -> Tensor:
    """Observe and round ``x`` by tritonq's operator.

    If that can't compute it (:func:`can_compute`), ``plain``, the library's forward, runs instead.
    """
    return quantize(self, x) if can_compute(self, x) else plain(self, x)


def _run_sum(ceiling: float | None, plain: _Forward, self: nn.Module, x: Tensor | float, y: Tensor) -> Tensor:
    """Return ``FQ(relu?(x + y))`` of a marked ``FloatFunctional``; ``ceiling``: infinity for a ReLU, None for none.

    One of ``x`` and ``y`` may be a number.
    """
    quantizer, tensor = cast(Any, self).activation_post_process, x if isinstance(x, Tensor) else y
    return add(x, y, quantizer, ceiling) if can_compute(quantizer, tensor) else plain(self, x, y)


def _put_before(kind: type[nn.Module], method: str, run: Callable[..., Tensor]) -> _Forward:
    """Replace a method of a library's class by one that calls ``run`` for marked modules; return the library's method.

    For a module without a mark the library's method runs.
    """
    plain: _Forward = getattr(kind, method)
    names = tuple(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def look_for_mark(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if MARK not in self.__dict__:
            return plain(self, *args, **kwargs)
        # By the names that the library gives them, which ``run`` does not know.
        named = [kwargs.pop(name) for name in names[len(args) :] if name in kwargs]
        return run(plain, self, *args, *named, **kwargs)

    # A code object of its own: torch.compile counts the graphs of a function by its code, over all classes.
    replacement = cast(types.FunctionType, look_for_mark)
    replacement.__code__ = replacement.__code__.replace(co_name=method)
    setattr(kind, method, replacement)
    return plain


def _let_graphs_trace_observer_hooks() -> None:
    """Give torch.compile a substitute for torch.ao's observer hook, which it refuses to trace."""
    hook = sys.modules["torch.ao.quantization.quantize"]._observer_forward_hook

    @torch.compiler.substitute_in_graph(hook, skip_signature_check=True)
    def observe(self: Any, inputs: Any, output: Tensor) -> Tensor:
        result: Tensor = self.activation_post_process(output)
        return result


# The forward of each class as the library has it.
_PLAIN: dict[type[nn.Module], _Forward] = {
    **{kind: _put_before(kind, "forward", _run_quantizer) for kind in _QUANTIZERS},
    **{kind: _put_before(kind, "forward", _run_layer) for kind in _LAYERS},
}
_put_before(FloatFunctional, "add", functools.partial(_run_sum, None))
_put_before(FloatFunctional, "add_relu", functools.partial(_run_sum, RELU))
_let_graphs_trace_observer_hooks()
