"""SiLU, Hardswish, sigmoid and other functions of one tensor whose output lies on a grid of its own.

A ``Function`` (`tritonq.reference.functions`) is the function itself: its name and arguments. FQ in formulas is fake
quantization: rounding to a grid, as a float tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.functions import function_codes, integer_function, integer_prelu, quantized_function
from tritonq.functional.host_grid import HostGrid
from tritonq.grid import Grid
from tritonq.nn.fusable import input_grid, observed_grid, warn_if_unobserved
from tritonq.nn.output_quantizer import meet_hooks
from tritonq.nn.unary import UnaryLayer
from tritonq.qconfig import QConfig
from tritonq.reference.functions import Function


class ElementwiseLayer(UnaryLayer):
    """``FQ(f(x))`` for a function f of one tensor: in training one operator, in eval mode a table of codes if possible.

    The table has the code of the result for each code of the input, whose grid must be known.

    This is a base class without a constructor of its own: that of a subclass sets ``function``, and calls
    :meth:`attach_quantizers`.

    Attributes:
        function: the function, by name and arguments.
    """

    function: Function

    def forward(self, input: Tensor) -> Tensor:
        """Return the function of ``input``, in its shape: fake-quantized, or in float without an output quantizer.

        The output quantizer, which observes in training, is the layer's own or that named by :meth:`set_quantizers`.
        """
        meet_hooks((self._source,), (input,), self.training)
        quantizer = self.output_quantizer
        if quantizer is None:
            return self.compute(input)
        observed = observed_grid(quantizer, input) if self.training else None
        if observed is None or observed[0].qtype.axis is not None:
            return cast(Tensor, quantizer(self._result(input)))
        source = self.input_quantizer
        known = input_grid(source) if isinstance(source, FakeQuantizeBase) else None
        y = quantized_function(input, self.function, known, *observed)
        warn_if_unobserved(quantizer)
        return y

    def compute(self, x: Tensor) -> Tensor:
        """Return the function's result in float, as torch computes it."""
        return self.function(x)

    def exact_codes(self, codes: Tensor, source: HostGrid, output: HostGrid) -> Tensor | None:
        """Return the codes of f, rounded and clipped, from a table with one entry per code; never None here.

        ``codes`` are those of the input on the grid ``source``, the result's are on the grid ``output``. Both are uint8
        and counted from the smallest code.
        """
        return function_codes(codes, self.function, source, output)


class FunctionLayer(ElementwiseLayer):
    """``FQ(f(x))`` for a function f of one tensor: what `prepare_qat` makes of ``nn.SiLU()`` or ``F.hardswish(x)``.

    In eval mode, if the grids of input and output are known, a table gives the result of each code (:meth:`exact`).
    Otherwise torch computes the function.

    In place of a function that a forward calls, the layer has no quantizer of its own. That one is a child of the
    module with that forward; :meth:`set_quantizers` names it, and the layer runs it.

    Args:
        function: the function, by name and arguments: ``Function("hardswish")``.
        qconfig: makes the quantizer of the output; None: the layer has none of its own.
        source_type: name of the class of torch.nn that it replaces, such as "SiLU"; None: it replaces a function.

    Examples:
        >>> import torch
        >>> FunctionLayer(Function("hardswish"))(torch.tensor([-4.0, 1.0, 3.0]))
        tensor([-0.0000, 0.6667, 3.0000])
    """

    def __init__(self, function: Function, *, qconfig: QConfig | None = None, source_type: str | None = None) -> None:
        super().__init__()
        self.function, self.source_type = function, source_type
        self.attach_quantizers(qconfig)

    @classmethod
    def from_float(cls, module: nn.Module, qconfig: QConfig | None = None) -> FunctionLayer:
        """Return the quantized layer for a module of torch.nn, in its training or eval mode, without its hooks.

        Args:
            module: the float module.
            qconfig: makes the quantizer of the output; None: the layer has none of its own.

        Raises:
            TypeError: the module's class is no key of :data:`FUNCTION_MODULES`; subclasses of the keys are none.
        """
        function = function_of(module)
        if function is None:
            raise TypeError(f"{type(module).__name__} is no function of one tensor that has a quantized form")
        return cls(function, qconfig=qconfig, source_type=type(module).__name__).train(module.training)

    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return ``round(f(x) / s) · s`` as integer runtimes compute it, with s the output's scale; not clipped.

        f is computed in float32, in ONNX Runtime's order. ``x`` has values of the grid ``source``, ``output`` is the
        grid of the quantizer behind the layer; both per tensor. float32, without gradient.
        """
        return integer_function(x, self.function, source, output)

    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the function for ``torch.compile``, in the dtype of ``x``, without gradient.

        ``source`` and ``output`` are the grids of input and result, both per tensor. The graph reads their switches
        when it runs. While both are on, the result of each code comes from a table, on the output's grid and not
        clipped, as in :meth:`exact`; else the result is ``f(x)`` in float.
        """
        # Imported here, so that its operators are registered when something is compiled, and not before.
        from tritonq.functional.traced import eval_mode

        return eval_mode.function(x, self.function, source, output)

    def extra_repr(self) -> str:
        """Return name and arguments of the function for ``repr``: "leaky_relu, 0.1"."""
        return ", ".join((self.function.name, *(f"{argument:g}" for argument in self.function.arguments)))


class PReLU(UnaryLayer, nn.PReLU):
    """PReLU with an output quantizer: ``FQ(max(0, x) + weight · min(0, x))``.

    In eval mode, if the grids of input and output are known, it is computed in float32 as ONNX Runtime does it.

    Args:
        num_parameters: number of slopes: 1, or the number of channels on axis 1. They begin at torch's 0.25:
            ``init``, ``device`` and ``dtype`` are no arguments here.
        qconfig: makes the quantizer of the output; None: the layer has none of its own, but :meth:`set_quantizers` may
            name one.
    """

    def __init__(self, num_parameters: int = 1, *, qconfig: QConfig | None = None) -> None:
        super().__init__(num_parameters)
        self.attach_quantizers(qconfig)

    @classmethod
    def from_float(cls, module: nn.PReLU, qconfig: QConfig | None = None) -> PReLU:
        """Return the quantized layer for a float ``nn.PReLU``, in its training or eval mode; they share the weight.

        Hooks stay with the float module.

        ``qconfig`` makes the quantizer of the output; None: the layer has none of its own.
        """
        made = cls(module.num_parameters, qconfig=qconfig)
        made.weight = module.weight
        return made.train(module.training)

    def compute(self, x: Tensor) -> Tensor:
        """Return the result in float, as torch computes it."""
        return F.prelu(x, self.weight.to(x.dtype))

    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return ``round((max(0, x) + weight · min(0, x)) / s) · s``, with s the output's scale; not clipped.

        It is computed in float32 as ONNX Runtime does. ``x`` has values of the grid ``source``, ``output`` is the grid
        of the quantizer behind the layer; both per tensor. float32, without gradient.
        """
        return integer_prelu(x, self.weight, source, output)

    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the result for ``torch.compile``, in the dtype of ``x``, without gradient.

        ``source`` and ``output`` are the grids of input and result. While both are switched on, which the graph reads
        when it runs, the result lies on the output's grid, not clipped, as :meth:`exact` rounds it; else the result
        is ``max(0, x) + weight · min(0, x)`` in float.
        """
        from tritonq.functional.traced import eval_mode

        return eval_mode.prelu(x, self.weight, source, output)


# What each module of torch.nn computes.
FUNCTION_MODULES: Mapping[type[nn.Module], Callable[[Any], Function]] = {
    nn.Sigmoid: lambda module: Function("sigmoid"),
    nn.Tanh: lambda module: Function("tanh"),
    nn.SiLU: lambda module: Function("silu"),
    nn.Hardsigmoid: lambda module: Function("hardsigmoid"),
    nn.Hardswish: lambda module: Function("hardswish"),
    nn.GELU: lambda module: Function("tanh_gelu" if module.approximate == "tanh" else "gelu"),
    nn.LeakyReLU: lambda module: Function("leaky_relu", (float(module.negative_slope),)),
    nn.ELU: lambda module: Function("elu", (float(module.alpha),)),
    nn.Softplus: lambda module: Function("softplus", (float(module.beta), float(module.threshold))),
    nn.Mish: lambda module: Function("mish"),
}


def function_of(module: object) -> Function | None:
    """Return the ``Function`` that a module computes: ``Function("elu", (1.0,))`` for ``nn.ELU()``.

    None unless its class is a key of :data:`FUNCTION_MODULES`; subclasses of the keys are none.
    """
    made = FUNCTION_MODULES.get(type(module))  # type: ignore[arg-type]
    return None if made is None else made(module)
