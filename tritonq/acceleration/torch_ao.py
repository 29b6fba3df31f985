"""Modules of torch.ao's eager quantization-aware training, with tritonq's operators in their forward.

Each class here inherits from the library's and replaces its forward alone: an instance changes its class and stays the
same object, with the same parameters, buffers, hooks and state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

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

from tritonq.acceleration.library_layers import HOOK, RELU, BatchNorm, Layer, add, affine, normalized
from tritonq.acceleration.quantizers import can_compute, is_attached, quantize
from tritonq.functional.recomputation import StepMemory
from tritonq.nn.batch_norm import batch_norm_state, is_plain
from tritonq.nn.qat import linear_map_of


def run_quantizer(self: Any, x: Tensor) -> Tensor:
    """Observe and round ``x``; as the library does where a cast changed the dtype of the quantizer's buffers."""
    return quantize(self, x) if can_compute(self, x) else cast(Tensor, self.library_class.forward(self, x))


def run_layer(self: Any, x: Tensor) -> Tensor:
    """Return the output of the library's layer, observed and rounded where tritonq took over its observer's hook."""
    return run_with(self, x, self.activation_post_process if HOOK in self.__dict__ else None)


def run_with(self: Any, x: Tensor, output_quantizer: nn.Module | None) -> Tensor:
    """Return the layer's result, rounded by ``output_quantizer`` where there is one."""
    if "bn" in self._modules and not is_plain(self.bn):
        y = cast(Tensor, self.library_class.forward(self, x))
        return y if output_quantizer is None else cast(Tensor, output_quantizer(y))
    memory = self.__dict__.setdefault("_tritonq_memory", StepMemory())
    grouping = (getattr(self, "transposed", False), getattr(self, "groups", 1))
    layer = Layer(linear_map_of(self), self.weight_fake_quant, output_quantizer, self.ceiling, grouping, memory)
    norm = _batch_norm(self)
    if norm is None:
        return affine(layer, x, self.weight, self.bias)
    return normalized(layer, x, self.weight, self.bias, norm)


def _batch_norm(held: Any) -> BatchNorm | None:
    """Return the BatchNorm in ``held``, whose batches are counted."""
    if "bn" not in held._modules:
        return None
    bn = held.bn
    training, momentum = bn.training, bn.momentum
    corrected = getattr(held, "_enable_slow_path_for_better_numerical_stability", False)
    if training:
        momentum = batch_norm_state(bn).momentum
    return BatchNorm(*(bn.weight, bn.bias, bn.running_mean, bn.running_var, momentum, bn.eps, training, corrected))


def refuse_conversion(self: Any, name: str) -> None:
    """Delete an attribute; refuse torch.ao's ``convert``, which removes observers and knows no accelerated class.

    It would leave accelerated layers in float, in silence. A conversion in place has changed other modules by then.

    Raises:
        ValueError: ``name`` is the observer's.
    """
    if name == "activation_post_process":
        raise ValueError("this model is accelerated: convert what tritonq.restore(model) returns")
    nn.Module.__delattr__(self, name)


def apply_as_library(self: Any, fn: Callable[[nn.Module], None]) -> Any:
    """Let ``fn`` see each child and ``self``, which has the library's class meanwhile.

    torch.ao's ``freeze_bn_stats`` and scripts of users look for exact classes, ``type(module) in {ConvBn2d, …}``, and
    pass over every other class in silence.
    """
    for child in self.children():
        child.apply(fn)
    own = type(self)
    self.__class__ = own.library_class
    try:
        fn(self)
    finally:
        self.__class__ = own
    return self


class AcceleratedFakeQuantize(FakeQuantize):
    """``FakeQuantize`` by tritonq's operators."""

    library_class = FakeQuantize
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_quantizer


class AcceleratedFusedFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """``FusedMovingAvgObsFakeQuantize`` by tritonq's operators."""

    library_class = FusedMovingAvgObsFakeQuantize
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_quantizer


class AcceleratedFixedFakeQuantize(FixedQParamsFakeQuantize):
    """``FixedQParamsFakeQuantize`` by tritonq's operators."""

    library_class = FixedQParamsFakeQuantize
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_quantizer


class AcceleratedLearnableFakeQuantize(_LearnableFakeQuantize):
    """``_LearnableFakeQuantize`` by tritonq's operators."""

    library_class = _LearnableFakeQuantize
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_quantizer


class AcceleratedConv1d(qat.Conv1d):
    """``qat.Conv1d`` by tritonq's operators."""

    library_class = qat.Conv1d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConv2d(qat.Conv2d):
    """``qat.Conv2d`` by tritonq's operators."""

    library_class = qat.Conv2d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConv3d(qat.Conv3d):
    """``qat.Conv3d`` by tritonq's operators."""

    library_class = qat.Conv3d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedLinear(qat.Linear):
    """``qat.Linear`` by tritonq's operators."""

    library_class = qat.Linear
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConvReLU1d(intrinsic.ConvReLU1d):
    """``intrinsic.qat.ConvReLU1d`` by tritonq's operators."""

    library_class = intrinsic.ConvReLU1d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedConvReLU2d(intrinsic.ConvReLU2d):
    """``intrinsic.qat.ConvReLU2d`` by tritonq's operators."""

    library_class = intrinsic.ConvReLU2d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedConvReLU3d(intrinsic.ConvReLU3d):
    """``intrinsic.qat.ConvReLU3d`` by tritonq's operators."""

    library_class = intrinsic.ConvReLU3d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedLinearReLU(intrinsic.LinearReLU):
    """``intrinsic.qat.LinearReLU`` by tritonq's operators."""

    library_class = intrinsic.LinearReLU
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedConvBn1d(intrinsic.ConvBn1d):
    """``intrinsic.qat.ConvBn1d`` by tritonq's operators."""

    library_class = intrinsic.ConvBn1d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConvBn2d(intrinsic.ConvBn2d):
    """``intrinsic.qat.ConvBn2d`` by tritonq's operators."""

    library_class = intrinsic.ConvBn2d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConvBn3d(intrinsic.ConvBn3d):
    """``intrinsic.qat.ConvBn3d`` by tritonq's operators."""

    library_class = intrinsic.ConvBn3d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedConvBnReLU1d(intrinsic.ConvBnReLU1d):
    """``intrinsic.qat.ConvBnReLU1d`` by tritonq's operators."""

    library_class = intrinsic.ConvBnReLU1d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedConvBnReLU2d(intrinsic.ConvBnReLU2d):
    """``intrinsic.qat.ConvBnReLU2d`` by tritonq's operators."""

    library_class = intrinsic.ConvBnReLU2d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedConvBnReLU3d(intrinsic.ConvBnReLU3d):
    """``intrinsic.qat.ConvBnReLU3d`` by tritonq's operators."""

    library_class = intrinsic.ConvBnReLU3d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = RELU


class AcceleratedLinearBn1d(intrinsic.LinearBn1d):
    """``intrinsic.qat.LinearBn1d`` by tritonq's operators."""

    library_class = intrinsic.LinearBn1d
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library
    forward: Any = run_layer
    run_with = run_with
    ceiling = None


class AcceleratedFloatFunctional(FloatFunctional):
    """``FloatFunctional`` whose additions are one operator with their quantizer."""

    library_class = FloatFunctional
    __delattr__ = refuse_conversion
    apply: Any = apply_as_library

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the rounded sum."""
        return self._sum(x, y, None)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the rounded ReLU of the sum."""
        return self._sum(x, y, RELU)

    def _sum(self, x: Tensor, y: Tensor, ceiling: float | None) -> Tensor:
        quantizer = self.activation_post_process
        if is_attached(quantizer) and can_compute(quantizer, x):
            return add(x, y, quantizer, ceiling)
        return super().add(x, y) if ceiling is None else super().add_relu(x, y)


# The class that takes the place of each class of the library.
CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    kind.library_class: kind
    for kind in (
        AcceleratedFakeQuantize,
        AcceleratedFusedFakeQuantize,
        AcceleratedFixedFakeQuantize,
        AcceleratedLearnableFakeQuantize,
        AcceleratedConv1d,
        AcceleratedConv2d,
        AcceleratedConv3d,
        AcceleratedLinear,
        AcceleratedConvReLU1d,
        AcceleratedConvReLU2d,
        AcceleratedConvReLU3d,
        AcceleratedLinearReLU,
        AcceleratedConvBn1d,
        AcceleratedConvBn2d,
        AcceleratedConvBn3d,
        AcceleratedConvBnReLU1d,
        AcceleratedConvBnReLU2d,
        AcceleratedConvBnReLU3d,
        AcceleratedLinearBn1d,
        AcceleratedFloatFunctional,
    )
}
