"""Additions and concatenations with a quantizer of their own, and torch.ao's stubs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.functional.integer import integer_add
from tritonq.functional.residual import residual_join
from tritonq.grid import Grid
from tritonq.nn.eval_mode import with_gradient_of
from tritonq.nn.fusable import ceiling_of, checked_ceiling, describe_relu, observed_grid, warn_if_unobserved
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig
from tritonq.qparams import QuantizedType
from tritonq.reference.activation import rectify


class _WithOutputQuantizer(ReferringModule):
    def __init__(self, qconfig: QConfig | None = None) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity() if qconfig is None else qconfig.activation()


@runtime_checkable
class GridSource(Protocol):
    """Puts values on a grid: a fake quantizer, or what it became in deployment."""

    qtype: QuantizedType

    def is_enabled_on_host(self) -> bool:
        """Whether it rounds. May synchronise with the device."""

    def grid(self) -> Grid:
        """Return the grid, with its switch on the device."""


class Add(_WithOutputQuantizer):
    """``FQ(relu?(a + b))``: a residual join. Without a qconfig, its output stays in float.

    ``ceiling`` is the upper bound of the ReLU: infinity for a plain one, 6 for ReLU6; None leaves it out.
    In eval mode, with both summands on known grids, it adds as integer runtimes do:
    :func:`tritonq.functional.integer.integer_add`.

    Raises:
        TypeError: a ceiling that is not a number.
        ValueError: one that is not positive.
    """

    def __init__(self, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(qconfig)
        self.ceiling = checked_ceiling(ceiling)
        self._producers: tuple[Reference[nn.Module], ...] = (Reference(), Reference())
        # In models that version 0.1.0 pickled, which hold quantizers and no producers: see `after_relu`.
        self._pickled_after_relu: tuple[bool, ...] | None = None

    def set_producers(self, a: nn.Module | None, b: nn.Module | None) -> None:
        """Set the modules that put the summands on their grids (None: unknown).

        A producer is a module with a quantizer of its output in the child ``activation_post_process``, or a quantizer.
        """
        self._producers, self._pickled_after_relu = (Reference(a), Reference(b)), None

    def set_input_quantizers(self, a: nn.Module | None, b: nn.Module | None) -> None:
        """Set the quantizers whose grids the summands lie on (None: unknown), where these aren't behind a ReLU."""
        self.set_producers(a, b)

    def replace_producers(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        """Refer to what took the place of a producer in the model, where something did."""
        self._producers = tuple(
            Reference(None if held.module is None else replacements.get(held.module, held.module))
            for held in self._producers
        )

    @property
    def producers(self) -> tuple[nn.Module | None, ...]:
        """The modules that put the summands on their grids, where known."""
        return tuple(held.module for held in self._producers)

    @property
    def input_quantizers(self) -> tuple[nn.Module | None, ...]:
        """The quantizers whose grids the summands lie on, where known."""
        return tuple(_quantizer_of(producer) for producer in self.producers)

    @property
    def linked_quantizers(self) -> tuple[nn.Module | None, ...]:
        """The quantizers of other modules that a saved file names."""
        return self.input_quantizers

    @property
    def after_relu(self) -> tuple[bool, ...]:
        """Whether each summand comes out of a ReLU and the quantizer behind it.

        Deployment stores such values from the code of zero on, and an addition's roundings depend on where codes begin.
        """
        if self._pickled_after_relu is not None:
            return self._pickled_after_relu
        return tuple(_ends_in_relu(producer) for producer in self.producers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_producers" not in state:
            quantizers = state.pop("_input_quantizers")
            held = {"_producers": tuple(map(Reference, quantizers)), "_pickled_after_relu": state.pop("after_relu")}
            state = {**state, **held}
        super().__setstate__(state)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Broadcasting sum of two tensors, fake-quantized."""
        total = None if self.training else self._exact_sum(a, b)
        if total is not None:
            if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
                total = with_gradient_of(total, a + b)
            return cast(Tensor, self.activation_post_process(rectify(total, self.ceiling)))
        observed = observed_grid(self.activation_post_process)
        if observed is not None and _can_join(a, b, observed[0]):
            y = residual_join(a, b, *observed, self.ceiling)
            warn_if_unobserved(self.activation_post_process)
            return y
        total = a + b
        return cast(Tensor, self.activation_post_process(rectify(total, self.ceiling)))

    @torch.no_grad()
    def _exact_sum(self, a: Tensor, b: Tensor) -> Tensor | None:
        """The sum as integer runtimes compute it, in ``a``'s dtype and without gradient; None where a grid is unknown.

        In a traced graph it is the float sum where a grid turns out to be off when the graph runs.
        """
        quantizers = (*self.input_quantizers, self.activation_post_process)
        relus = (*self.after_relu, self.ceiling is not None)
        if torch.compiler.is_compiling():
            trained = [quantizer for quantizer in quantizers if isinstance(quantizer, FakeQuantizeBase)]
            if trained:
                if len(trained) < len(quantizers) or any(quantizer.qtype.axis is not None for quantizer in trained):
                    return None
                from tritonq.functional.traced import eval_mode

                grids = [_deployed(quantizer.grid(), relu) for quantizer, relu in zip(trained, relus, strict=True)]
                return eval_mode.add(a, b, *grids)
        sources = [cast(GridSource, quantizer) for quantizer in quantizers if isinstance(quantizer, GridSource)]
        if len(sources) < len(quantizers):
            return None
        if any(source.qtype.axis is not None or not source.is_enabled_on_host() for source in sources):
            return None
        grids = [_deployed(source.grid(), relu) for source, relu in zip(sources, relus, strict=True)]
        return integer_add(a, b, *grids).to(a.dtype)

    def extra_repr(self) -> str:
        """The ReLU, where there is one."""
        return describe_relu(self.ceiling)


def _quantizer_of(producer: nn.Module | None) -> nn.Module | None:
    """The quantizer of a producer's output, which may be the producer."""
    if producer is None or isinstance(producer, GridSource):
        return producer
    return producer._modules.get("activation_post_process")


def _ends_in_relu(producer: nn.Module | None) -> bool:
    """Whether the output of a producer went through a ReLU before its quantizer."""
    ceiling = getattr(producer, "ceiling", None)
    return ceiling is not None or ceiling_of(producer) is not None


def _deployed(grid: Grid, relu: bool) -> Grid:
    """Return the grid with the codes that deployment has: behind a ReLU from that of zero on, if the type fixes it."""
    zero = grid.qtype.fixed_zero_point
    if zero is None or not relu:
        return grid
    return Grid(grid.scale, grid.zero_point, replace(grid.qtype, quant_min=zero, symmetric=False), grid.enabled)


def _can_join(a: Tensor, b: Tensor, grid: Grid) -> bool:
    """Whether one operator does it: two float tensors alike, one scale for all."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.is_floating_point()
    return alike and grid.qtype.axis is None


class Cat(_WithOutputQuantizer):
    """``FQ(cat(tensors, dim))``: all parts on one grid. Without a qconfig, its output stays in float."""

    def __init__(self, dim: int = 0, *, qconfig: QConfig | None = None) -> None:
        super().__init__(qconfig)
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenation along ``dim``, fake-quantized."""
        return cast(Tensor, self.activation_post_process(torch.cat(tuple(tensors), self.dim)))

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"


class QuantStub(nn.Module):
    """Marks where a tensor enters the quantized part: `prepare_qat` puts a quantizer here. Source: torch.ao."""

    def __init__(self, qconfig: QConfig | None = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class DeQuantStub(QuantStub):
    """Marks where a tensor leaves the quantized part. Source: torch.ao."""


class FloatFunctional(_WithOutputQuantizer):
    """torch.ao's module form of tensor arithmetic: each method's result passes ``activation_post_process``.

    Source: torch.ao.nn.quantized.FloatFunctional.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Not callable as a module.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("FloatFunctional has no forward; call its methods, such as add()")

    def add(self, x: Tensor, y: Tensor | float) -> Tensor:
        """``FQ(x + y)``."""
        return cast(Tensor, self.activation_post_process(torch.add(x, y)))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x + y``, unquantized."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """``FQ(x * y)``."""
        return cast(Tensor, self.activation_post_process(torch.mul(x, y)))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x * y``, unquantized."""
        return torch.mul(x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """``FQ(cat(x, dim))``."""
        return cast(Tensor, self.activation_post_process(torch.cat(tuple(x), dim)))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """``FQ(relu(x + y))``."""
        return cast(Tensor, self.activation_post_process(F.relu(torch.add(x, y))))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """``FQ(x @ y)``."""
        return cast(Tensor, self.activation_post_process(torch.matmul(x, y)))
