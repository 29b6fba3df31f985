"""Average pools and means over axes with an output on a grid of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.functional.averages import integer_average
from tritonq.nn.elementwise import GridSource
from tritonq.nn.eval_mode import with_gradient_of
from tritonq.nn.reference import Reference
from tritonq.qconfig import QConfig
from tritonq.reference.averages import AdaptiveAverage, Averaging, WindowAverage


class AverageLayer(nn.Module):
    """``FQ(mean)``, where every result is the mean of some elements of the input.

    In eval mode, with the grids of input and output known, the codes of the input are added in integers:
    :func:`tritonq.functional.averages.integer_average`. Everywhere else the mean is torch's.

    Attributes:
        activation_post_process: quantizer of the output; an Identity where another module quantizes it.
    """

    activation_post_process: nn.Module

    def attach_quantizers(self, qconfig: QConfig | None) -> None:
        """Create the output's quantizer; None: the output stays in float, or another module quantizes it."""
        self.activation_post_process = nn.Identity() if qconfig is None else qconfig.activation()
        self._source: Reference[nn.Module] = Reference()
        self._output: Reference[nn.Module] = Reference()

    def set_quantizers(self, source: nn.Module | None, output: nn.Module | None = None) -> None:
        """Say which quantizer's grid the input lies on (None: unknown).

        ``output`` is the quantizer that reads this module's result, and alone does, where the module has none itself.
        """
        self._source, self._output = Reference(source), Reference(output)

    def replace_quantizers(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        """Refer to what took the place of a quantizer in the model."""
        found = [None if held is None else replacements.get(held, held) for held in self.linked_quantizers]
        self.set_quantizers(*found)

    @property
    def linked_quantizers(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The quantizers of input and output, where known; what a saved file names."""
        return self.input_quantizer, self.output_quantizer

    @property
    def input_quantizer(self) -> nn.Module | None:
        """The quantizer whose grid the input lies on, where known."""
        return self._source.module

    @property
    def output_quantizer(self) -> nn.Module | None:
        """The quantizer of the result: the module's own, or the one that follows it; None: neither."""
        own = self.activation_post_process
        return self._output.module if type(own) is nn.Identity else own

    @property
    @abstractmethod
    def averaging(self) -> Averaging:
        """The operation without quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized means of ``x``; shapes as torch has them."""
        return cast(Tensor, self.activation_post_process(self._means(x)))

    def _means(self, x: Tensor) -> Tensor:
        if self.training:
            return self.averaging(x)
        exact = self._exact_means(x)
        if exact is None:
            return self.averaging(x)
        exact = exact.to(x.dtype)
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        return with_gradient_of(exact, self.averaging(x)) if needs_grad else exact

    def _exact_means(self, x: Tensor) -> Tensor | None:
        """Return the means as integer runtimes compute them, without gradient; None where a grid is unknown.

        In a traced graph they are the float means where a grid turns out to be off when the graph runs.
        """
        source, output = self.input_quantizer, self.output_quantizer
        if not isinstance(source, GridSource) or not isinstance(output, GridSource):
            return None
        if source.qtype.axis is not None or output.qtype.axis is not None:
            return None
        if torch.compiler.is_compiling() and isinstance(source, FakeQuantizeBase):
            # Imported here, so that its operators are registered when something is compiled, and not before.
            from tritonq.functional.traced import eval_mode

            return eval_mode.average(x, self.averaging, source.grid(), output.grid())
        if not source.is_enabled_on_host() or not output.is_enabled_on_host():
            return None
        return integer_average(x, self.averaging, source.grid(), output.grid())


class Average(AverageLayer):
    """Any mean as a module: what `prepare_qat` makes of ``x.mean((2, 3))`` or ``F.avg_pool2d(x, 2)`` in a forward.

    Args:
        averaging: the operation, one of `tritonq.reference.averages`.
        qconfig: quantizer of the output; None: none of its own.

    Examples:
        >>> from tritonq.reference.averages import AxesAverage
        >>> Average(AxesAverage((2, 3)))(torch.ones(1, 4, 5, 5)).shape
        torch.Size([1, 4])
    """

    def __init__(self, averaging: Averaging, *, qconfig: QConfig | None = None) -> None:
        super().__init__()
        self._averaging = averaging
        self.attach_quantizers(qconfig)

    @property
    def averaging(self) -> Averaging:
        """The operation without quantizers."""
        return self._averaging

    def extra_repr(self) -> str:
        """Return the operation."""
        return repr(self._averaging)


class _Pool(AverageLayer):
    """A pool of torch.nn with an output quantizer."""

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig)

    @classmethod
    def from_float(cls, pool: nn.Module, qconfig: QConfig | None = None) -> AverageLayer:
        """Return the quantized form of a float pool, in its mode; hooks are not moved."""
        made: Any = cls.__new__(cls)
        nn.Module.__init__(made)
        names = set(vars(pool)) - set(vars(made))
        vars(made).update({name: vars(pool)[name] for name in names})
        made.attach_quantizers(qconfig)
        made.train(pool.training)
        return cast(AverageLayer, made)


class _WindowPool(_Pool):
    @property
    def averaging(self) -> Averaging:
        """The operation without quantizers."""
        return window_average(self)


class _AdaptivePool(_Pool):
    @property
    def averaging(self) -> Averaging:
        """The operation without quantizers."""
        return adaptive_average(self)


class AvgPool1d(_WindowPool, nn.AvgPool1d):
    """AvgPool1d with an output quantizer; see :class:`AverageLayer`."""


class AvgPool2d(_WindowPool, nn.AvgPool2d):
    """AvgPool2d with an output quantizer; see :class:`AverageLayer`."""


class AvgPool3d(_WindowPool, nn.AvgPool3d):
    """AvgPool3d with an output quantizer; see :class:`AverageLayer`."""


class AdaptiveAvgPool1d(_AdaptivePool, nn.AdaptiveAvgPool1d):
    """AdaptiveAvgPool1d with an output quantizer; see :class:`AverageLayer`."""


class AdaptiveAvgPool2d(_AdaptivePool, nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d with an output quantizer; see :class:`AverageLayer`."""


class AdaptiveAvgPool3d(_AdaptivePool, nn.AdaptiveAvgPool3d):
    """AdaptiveAvgPool3d with an output quantizer; see :class:`AverageLayer`."""


# By the float pool that each is derived from.
POOL_TYPES: dict[type[nn.Module], type[_Pool]] = {
    nn.AvgPool1d: AvgPool1d,
    nn.AvgPool2d: AvgPool2d,
    nn.AvgPool3d: AvgPool3d,
    nn.AdaptiveAvgPool1d: AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: AdaptiveAvgPool3d,
}
_RANKS = {cls: int(cls.__name__[-2]) for cls in POOL_TYPES}


def averaging_of(pool: nn.Module) -> Averaging | None:
    """Return the operation of an average pool of torch.nn; None for any other module."""
    if isinstance(pool, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return window_average(pool)
    if isinstance(pool, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return adaptive_average(pool)
    return None


def window_average(pool: Any) -> WindowAverage:
    """Return the operation of an ``nn.AvgPool1d``, ``2d`` or ``3d``."""
    rank = _rank(pool)
    kernel, stride, padding = (_per_axis(value, rank) for value in (pool.kernel_size, pool.stride, pool.padding))
    divisor = getattr(pool, "divisor_override", None)
    return WindowAverage(kernel, stride, padding, bool(pool.ceil_mode), bool(pool.count_include_pad), divisor)


def adaptive_average(pool: Any) -> AdaptiveAverage:
    """Return the operation of an ``nn.AdaptiveAvgPool1d``, ``2d`` or ``3d``."""
    return AdaptiveAverage(_per_axis(pool.output_size, _rank(pool)))


def _rank(pool: nn.Module) -> int:
    return next(rank for cls, rank in _RANKS.items() if isinstance(pool, cls))


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return entries * rank if len(entries) == 1 else entries
