"""Average pools and means over axes whose output lies on a grid of its own.

An ``Averaging`` (`tritonq.reference.average_pool`) describes the mean itself: an ``AxesAverage`` has axes, a
``WindowAverage`` windows and an ``AdaptiveAverage`` an output size. FQ in formulas is fake quantization of the output,
by the quantizer that ``qconfig=`` makes; without a qconfig the layer has no quantizer of its own.
*Exact* is ``round(fl(Σ) · fl(s_in / fl(s_out · N))) · s_out`` with Σ the sum of codes minus zero point, N the number
that torch divides by, s the scales, and fl rounding to float32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

from torch import Tensor, nn

from tritonq.functional.average_pool import average_codes, integer_average
from tritonq.functional.host_grid import HostGrid
from tritonq.functional.linear_map import per_axis
from tritonq.grid import Grid
from tritonq.nn.unary import UnaryLayer
from tritonq.qconfig import QConfig
from tritonq.reference.average_pool import AdaptiveAverage, Averaging, WindowAverage


class AverageLayer(UnaryLayer):
    """``FQ(mean(x))``, where every result is the mean of some elements of the input; FQ is fake quantization.

    In eval mode, if the grids of input and output are known, switched on and of one scale each, the mean is computed
    from integer codes (:meth:`exact`). Otherwise torch computes it.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.AvgPool2d(2), torch.nn.Conv2d(2, 2, 1))
        >>> qat = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 1, 4, 4))
        >>> type(qat[1]).__name__, isinstance(qat[1], tritonq.nn.AverageLayer)
        ('AvgPool2d', True)
    """

    @property
    @abstractmethod
    def averaging(self) -> Averaging:
        """The mean that the layer computes, as an ``AxesAverage``, ``WindowAverage`` or ``AdaptiveAverage``.

        It says which elements each mean takes, and what their sum is divided by.
        """

    def compute(self, x: Tensor) -> Tensor:
        """Return the mean in float, as torch computes it."""
        return self.averaging.mean(x)

    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the mean as integer runtimes compute it: float32 on the output's grid, not clipped, without gradient.

        ``round(fl(Σ) · fl(s_in / fl(s_out · N))) · s_out`` with Σ the exact sum of codes minus zero point, N the number
        that torch divides by, and fl the rounding to float32. ``x`` has values of the grid ``source``, whose scale is
        s_in; ``output`` is the grid of the quantizer behind the layer, with s_out. Both grids are per tensor.
        """
        return integer_average(x, self.averaging, source, output)

    def exact_codes(self, codes: Tensor, source: HostGrid, output: HostGrid) -> Tensor | None:
        """Return the codes of the mean on the grid ``output``, clipped, as integer runtimes have them; never None here.

        ``codes`` are those of the input, on the grid ``source``. Codes of input and result are uint8 CPU tensors, each
        counted from the smallest code of its grid.
        """
        return average_codes(codes, self.averaging, source, output)

    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the mean for ``torch.compile``, in the dtype of ``x``, without gradient.

        ``source`` and ``output`` are the grids of input and result. While both are switched on, which the graph reads
        when it runs, the mean is that of :meth:`exact`, not clipped; else it is the mean in float.
        """
        # Imported here, so that its operators are registered when something is compiled, and not before.
        from tritonq.functional.traced import eval_mode

        return eval_mode.average(x, self.averaging, source, output)


class Average(AverageLayer):
    """``FQ(mean(x))``: what `prepare_qat` makes of ``x.mean((2, 3))`` or ``F.avg_pool2d(x, 2)`` in a forward.

    Args:
        averaging: the mean: an ``AxesAverage``, ``WindowAverage`` or ``AdaptiveAverage``.
        qconfig: makes the quantizer of the output; None: the module has none of its own.

    Examples:
        >>> import torch
        >>> from tritonq.reference.average_pool import AxesAverage
        >>> Average(AxesAverage((2, 3)))(torch.ones(1, 4, 5, 5)).shape
        torch.Size([1, 4])
    """

    def __init__(self, averaging: Averaging, *, qconfig: QConfig | None = None) -> None:
        super().__init__()
        self._averaging = averaging
        self.attach_quantizers(qconfig)

    @property
    def averaging(self) -> Averaging:
        """The mean that the module computes, as it was given to the constructor."""
        return self._averaging

    def extra_repr(self) -> str:
        """Return the mean as text for ``repr``, such as ``"AxesAverage(axes=(2, 3), keepdim=False)"``."""
        return repr(self._averaging)


class _Pool(AverageLayer):
    """An average pool of torch.nn with an output quantizer; its constructor is the float pool's, plus ``qconfig=``."""

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig)

    @classmethod
    def from_float(cls, pool: nn.Module, qconfig: QConfig | None = None) -> AverageLayer:
        """Return a new pool of this class with a float pool's attributes and mode, but without its hooks.

        Args:
            pool: the float pool, of the class of torch.nn that this class derives from.
            qconfig: makes the quantizer of the output; None: the pool has none of its own.
        """
        made: Any = cls.__new__(cls)
        nn.Module.__init__(made)
        names = set(vars(pool)) - set(vars(made))
        vars(made).update({name: vars(pool)[name] for name in names})
        made.attach_quantizers(qconfig)
        made.train(pool.training)
        return cast(AverageLayer, made)


class _WindowPool(_Pool):
    """The base of AvgPool1d, 2d and 3d: ``FQ(mean)`` of each window, which the float pool's arguments set."""

    @property
    def averaging(self) -> Averaging:
        """The mean that the pool computes, a ``WindowAverage`` with its kernel, stride, padding and other arguments."""
        return window_average(self)


class _AdaptivePool(_Pool):
    """The base of AdaptiveAvgPool1d, 2d and 3d: ``FQ(mean)`` of windows such that the output has a given size."""

    @property
    def averaging(self) -> Averaging:
        """The mean that the pool computes, an ``AdaptiveAverage`` with its output size."""
        return adaptive_average(self)


class AvgPool1d(_WindowPool, nn.AvgPool1d):
    """``nn.AvgPool1d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AvgPool1d(2)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """


class AvgPool2d(_WindowPool, nn.AvgPool2d):
    """``nn.AvgPool2d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AvgPool2d(2)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 4, 4])
    """


class AvgPool3d(_WindowPool, nn.AvgPool3d):
    """``nn.AvgPool3d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AvgPool3d(2)(torch.ones(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 2, 2, 2])
    """


class AdaptiveAvgPool1d(_AdaptivePool, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AdaptiveAvgPool1d(1)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 1])
    """


class AdaptiveAvgPool2d(_AdaptivePool, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AdaptiveAvgPool2d(1)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 1, 1])
    """


class AdaptiveAvgPool3d(_AdaptivePool, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` with an output quantizer, ``FQ(mean(x))``: its arguments, plus ``qconfig=``.

    Examples:
        >>> import torch
        >>> AdaptiveAvgPool3d(1)(torch.ones(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 1, 1, 1])
    """


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
    """Return the mean that an average pool of torch.nn computes, as data.

    A ``WindowAverage`` for ``AvgPool``, an ``AdaptiveAverage`` for ``AdaptiveAvgPool`` (1d, 2d, 3d, and subclasses);
    None for any other module.
    """
    if isinstance(pool, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return window_average(pool)
    if isinstance(pool, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return adaptive_average(pool)
    return None


def window_average(pool: Any) -> WindowAverage:
    """Return the mean of an ``nn.AvgPool1d``, ``2d`` or ``3d`` as data.

    It has kernel, stride and padding as tuples with a number per axis, and the flags ``ceil_mode`` and
    ``count_include_pad`` and the ``divisor_override`` (None: the number of elements) of the pool.
    """
    rank = _rank(pool)
    step = pool.kernel_size if pool.stride in ([], ()) else pool.stride
    kernel, stride, padding = (per_axis(value, rank) for value in (pool.kernel_size, step, pool.padding))
    divisor = getattr(pool, "divisor_override", None)
    return WindowAverage(kernel, stride, padding, bool(pool.ceil_mode), bool(pool.count_include_pad), divisor)


def adaptive_average(pool: Any) -> AdaptiveAverage:
    """Return the mean of an ``nn.AdaptiveAvgPool1d``, ``2d`` or ``3d`` as data.

    Its ``output_size`` is a tuple with one number per pooled axis, or None for the input's size along that axis.
    """
    return AdaptiveAverage(per_axis(pool.output_size, _rank(pool)))


def _rank(pool: nn.Module) -> int:
    """Return the number of axes of an average pool's window: 1, 2 or 3."""
    return next(rank for cls, rank in _RANKS.items() if isinstance(pool, cls))
