"""The operations between fixed-point layers: residual additions and pooling, on tensors with scaling factors.

A *format* says how a tensor is stored in fixed point; η is its scaling factor. The *following* format is that of the
tensor in which the result is read.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.nn.fixed_point_layer import ActivationFormat
from tritonq.nn.reference import Reference, ReferringModule


class FixedPointAdd(ReferringModule):
    """``a + b`` with both summands divided by η, the scaling factor of the layer that reads the sum.

    A summand that some layer reads too, or that went through a ReLU, has a format of its own, with a factor η'. It is
    rounded to that, and its codes count in the sum as codes of the sum's format: they are multiplied by ``η' / η``, a
    power of two, since both formats share ``|α| / levels`` (:meth:`ActivationFormat.share_step`). A summand that only
    the sum reads was divided by η when it was made.

    Args:
        formats: the format of each summand; None for a summand without a format of its own.
        observes: for each summand whether this addition is the first to read it, and so observes it.
        following: the format in which the sum is read; None: the network returns it, divided by no factor.

    Attributes:
        formats: ``nn.ModuleDict`` of the summands' own formats, by position "0" or "1"; without those that are None.
        observes: for each summand whether this addition is the first to read it, and so observes it.
        raw_output: whether another addition reads the sum without rounding it first; `prepare_qat` sets it.

    Examples:
        >>> import torch
        >>> FixedPointAdd()(torch.tensor([0.5]), torch.tensor([0.25]))
        tensor([0.7500])
    """

    raw_output: bool = False
    _references = ("_following",)

    def __init__(
        self,
        formats: tuple[ActivationFormat | None, ActivationFormat | None] = (None, None),
        observes: tuple[bool, bool] = (True, True),
        following: ActivationFormat | None = None,
    ) -> None:
        super().__init__()
        self.formats = nn.ModuleDict({str(i): found for i, found in enumerate(formats) if found is not None})
        self.observes = observes
        self._following = Reference(following)
        self._sources: tuple[Reference[nn.Module], Reference[nn.Module]] = (Reference(), Reference())

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_sources" not in state:  # pickled by version 0.1.0
            state["_sources"] = tuple(map(Reference, state.pop("sources")))
        super().__setstate__(state)

    @property
    def following(self) -> ActivationFormat | None:
        """The format in which the sum is read; None if the network returns it, divided by no factor."""
        return self._following.module

    @property
    def sources(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules that make the summands a and b, in this order; None for one that has a format of its own.

        Deployment reads the fractional lengths of their results. Both are None until :meth:`set_sources` was called; an
        addition with a summand without a format has no deployed form before that.
        """
        a, b = self._sources
        return a.module, b.module

    def set_sources(self, a: nn.Module | None, b: nn.Module | None) -> None:
        """Set the modules that make the summands a and b, for deployment, which reads the scaling of their results.

        None for a summand that has a format of its own. They do not become children.
        """
        self._sources = (Reference(a), Reference(b))

    def format_of(self, summand: int) -> ActivationFormat | None:
        """Return the own format of summand 0 or 1; None if it has none."""
        return cast(ActivationFormat, self.formats[str(summand)]) if str(summand) in self.formats else None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of two tensors of one shape, divided by the η of the format that follows (None: by nothing).

        A summand without a format of its own was divided by that η before, and is added as it is. One with a format
        was divided by that format's η'. It is rounded (in phase ``"floating"`` clipped), and multiplied by ``η' / η``
        if a format follows. In phase ``"floating_wo_clip"`` nothing is rounded or has a factor; an unsigned format
        applies a ReLU to its summand. If one summand is float64, the sum is. In training a format observes its summand
        if ``observes`` is True for it; in phase ``"floating_wo_clip"`` none does.
        """
        left, right = self._read(0, a), self._read(1, b)
        return left + right

    def _read(self, summand: int, x: Tensor) -> Tensor:
        """Return a summand in units of the sum's format: rounded, if it has a format of its own."""
        own, following = self.format_of(summand), self.following
        if own is None:
            return x
        rounded = own.read(x, self.observes[summand])
        if own.phase == "floating_wo_clip" or following is None:
            return rounded
        return rounded * own.power_between(following).to(rounded.dtype)


class FixedPointAvgPool2d(ReferringModule):
    """Average pooling of fixed-point values: a sum and a shift.

    ``y = Σ xq / 2^round(log2 k²) · η/η_following`` with k² values per window. Both factors are powers of two, since
    this layer's format and the following one share ``|α| / levels`` (:meth:`ActivationFormat.share_step`). What
    remains, ``2^round(log2 k²) / k²``, is multiplied into the following layer's weights: its ``input_factor`` is this
    layer's ``remaining_factor``.

    Args:
        kernel_size: window, (height, width); None: the whole image, whose area must then be given.
        stride: distance of windows, (vertical, horizontal) or one number; None: the window. The whole image has none.
        padding: zeros on each side, (vertical, horizontal) or one number; they count in the average. The whole image
            gets none.
        input_format: format of the input.
        area: height times width of the whole image; not used if ``kernel_size`` is given.
        observes: whether this layer is the first reader of its input, and so observes it.
        following: format in which the output is read; None: the network returns it, divided by no factor.
        keepdim: whether the average of a whole image keeps its two axes.

    Raises:
        ValueError: the window is the whole image and no area is given.

    Shapes: (n, c, h, w) to (n, c, h', w'); for the whole image to (n, c, 1, 1), or (n, c) without ``keepdim``.

    Source: docs/fixed-point.md.

    Examples:
        >>> import torch, tritonq
        >>> following = tritonq.nn.FixedPointLinear(2, 2, qconfig=tritonq.get_qconfig("f8net"))
        >>> pool = FixedPointAvgPool2d((2, 2), input_format=following.input_format)
        >>> pool(torch.rand(1, 2, 4, 4)).shape
        torch.Size([1, 2, 2, 2])
    """

    raw_output: bool = False
    _references = ("_following",)

    def __init__(
        self,
        kernel_size: tuple[int, int] | None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int] = (0, 0),
        *,
        input_format: ActivationFormat,
        area: int | None = None,
        observes: bool = True,
        following: ActivationFormat | None = None,
        keepdim: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size is not None:
            area = kernel_size[0] * kernel_size[1]
        if area is None:
            raise ValueError("an average over the whole image needs area=, the number of values in it")
        self.kernel_size, self.padding = kernel_size, padding
        self.stride = kernel_size if stride is None else stride
        self.area, self.keepdim = area, keepdim
        self.input_format, self.observes = input_format, observes
        self._following = Reference(following)

    @property
    def following(self) -> ActivationFormat | None:
        """The format in which the output is read; None if the network returns it, divided by no factor."""
        return self._following.module

    @property
    def shift(self) -> int:
        """``round(log2 k²)``: the sum over a window is divided by two to this power."""
        return pooling_shift(self.area)

    @property
    def remaining_factor(self) -> float:
        """``2^shift / k²``: the factor to be multiplied into the next layer's weights."""
        return remaining_factor(self.area)

    def forward(self, input: Tensor) -> Tensor:
        """Return the mean in phase ``"floating_wo_clip"``, else the mean divided by ``remaining_factor``.

        The phase is that of ``input_format``. In the other phases the next layer's weights have the factor.

        The mean is that of ``input_format.read(input, observes)``: of the rounded input in phase ``"fixed"``, of the
        clipped one in ``"floating"``, and in ``"floating_wo_clip"`` of its ReLU, or of the input as it is if the format
        is signed. In training the first two observe the input, if ``observes`` is True.

        If there is a following format, the divided mean is multiplied by ``η/η_following`` as well.

        Raises:
            ValueError: the window is the whole image, and the image has not ``area`` values.
        """
        rounded = self.input_format.read(input, self.observes)
        height, width = input.shape[-2:]
        if self.kernel_size is None and width * height != self.area:
            raise ValueError(
                f"this average was prepared for images of {self.area} values, got {height} by {width}; its factor is "
                "part of the next layer's weights"
            )
        total = self.sum(rounded)
        if self.input_format.phase == "floating_wo_clip":
            return total / self.area
        total = total * 2.0**-self.shift
        following = self.following
        return total if following is None else total * self.input_format.power_between(following).to(total.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over each window of ``x`` (n, c, h, w): (n, c, h', w'), where the padding counts as zeros.

        Of the whole image it is (n, c, 1, 1), or (n, c) without ``keepdim``. ``x`` is not rounded here.
        """
        if self.kernel_size is None:
            return x.sum((2, 3), keepdim=self.keepdim)
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, divisor_override=1)

    def extra_repr(self) -> str:
        """Return the text for ``repr``, such as ``"(3, 3), stride=(3, 3), shift=3, remaining_factor=0.8889"``."""
        window = "whole image" if self.kernel_size is None else f"{self.kernel_size}, stride={self.stride}"
        return f"{window}, shift={self.shift}, remaining_factor={self.remaining_factor:.4g}"


class FixedPointMaxPool2d(nn.MaxPool2d):
    """Max pooling of float values or of integer codes: the largest code is the code of the largest value.

    The constructor is that of ``nn.MaxPool2d``; ``return_indices`` must stay False, which is not checked.

    Examples:
        >>> import torch
        >>> FixedPointMaxPool2d(2)(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[[[3.]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the result of ``nn.MaxPool2d``, for an input of floats or integers, in the input's dtype."""
        if input.is_floating_point() or input.is_cpu:
            return cast(Tensor, super().forward(input))
        # torch has no integer pooling on GPUs. Codes and 32-bit accumulators are exact in float64, and nothing is
        # computed with them.
        return cast(Tensor, super().forward(input.double()).to(input.dtype))


def pooling_shift(area: int) -> int:
    """Return ``round(log2 area)`` for the number of values in a window, at least 1: 9 gives 3."""
    below = area.bit_length() - 1
    # Nearer to the next power of two where area > 2^(below + 1/2), that is area² > 2^(2 below + 1).
    return below + int(area * area > 2 ** (2 * below + 1))


def remaining_factor(area: int) -> float:
    """Return ``2^round(log2 area) / area`` for the number of values in a window: 9 gives 8/9.

    Pooling divides sums by that power of two; the following layer's weights are multiplied by this factor.
    """
    return 2.0 ** pooling_shift(area) / area
