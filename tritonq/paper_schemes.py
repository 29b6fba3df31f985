"""Quantizers of few bits after their papers: DoReFa-Net, binary weights of XNOR-Net, ternary weight networks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.gradients import with_gradient_of
from tritonq.functional.validate import check_float_tensor
from tritonq.observers import PassiveObserver
from tritonq.quantized_type import QuantizedType

# 2^8 levels between -1 and 1 are codes of nine bits.
_MOST_BITS = 7


class WeightScheme(FakeQuantizeBase):
    """Base class of fake quantizers of weights whose codes follow from a formula of the whole tensor.

    The codes are not those nearest to the weight. In training mode each forward computes the scale from its weight;
    eval mode and deployment use the last one. Before the first such forward, values pass through.

    Args:
        quant_max: largest code; the smallest is its negative.
        ch_axis: 0 for one scale per output channel, or None for one per tensor.

    Raises:
        ValueError: another axis.
    """

    initialized: Tensor
    rounds_to_nearest = False
    batch_axis = None

    def __init__(self, quant_max: int, ch_axis: int | None) -> None:
        super().__init__()
        if ch_axis not in (None, 0):
            raise ValueError(f"weights have a scale per tensor (ch_axis=None) or per out channel (0), got {ch_axis!r}")
        self.qtype = QuantizedType(-quant_max, quant_max, True, ch_axis)
        self.register_buffer("scale", torch.ones(1 if ch_axis is None else 0))
        self.register_buffer("zero_point", torch.zeros(self.scale.shape, dtype=torch.int32))
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.uint8))

    @abstractmethod
    def scale_of(self, weight: Tensor) -> Tensor:
        """Return the scale for ``weight`` by the paper's formula, in training and in eval mode alike.

        :meth:`forward` calls it in training mode alone, and keeps the result in the buffer ``scale`` for eval mode,
        unless ``observer_enabled`` is 0. The result has the weight's dtype and as many axes: (channels, 1, …), or
        (1, 1, …) per tensor.
        """

    @abstractmethod
    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the values of the weight's codes, ``code * scale``, in its dtype and with the paper's gradient.

        Args:
            weight: the weight, in any float dtype.
            scale: in training that of :meth:`scale_of`, else the last one of training; it broadcasts against
                ``weight``.
        """

    def allocate(self, num_channels: int) -> None:
        """Resize ``scale`` (to ones) and ``zero_point`` (to zeros) to ``num_channels`` elements, in place.

        Nothing is done if there is one scale per tensor, or if they have that length. Otherwise ``initialized`` becomes
        0: values pass through until a forward in training mode sets the scale.
        """
        if self.qtype.axis is not None and self.scale.numel() != num_channels:
            self.scale.resize_(num_channels).fill_(1)
            self.zero_point.resize_(num_channels).zero_()
            self.initialized.zero_()
            self._qparams_known = False

    def rests_on_data(self) -> Tensor:
        """Return the buffer ``initialized``, uint8, (1,): 1 once a forward in training mode set the scale, else 0."""
        return self.initialized

    def forward(self, weight: Tensor) -> Tensor:
        """Fake quantize ``weight``; in training mode its scale is found first, unless ``observer_enabled`` is 0.

        An empty weight is returned as it is, and so is any weight while rounding is off or no scale is set.

        Raises:
            TypeError: a weight that is no floating point tensor.
            ValueError: a weight without an axis.
        """
        if check_float_tensor("weight", weight).dim() == 0:
            raise ValueError("a weight has its output channels along its first axis, got a single number")
        if weight.numel() == 0:
            return weight
        self.allocate(len(weight))
        scale = self.scale.to(weight.dtype).view(self._shape(weight))
        if self.training:
            found = self.scale_of(weight)
            scale = torch.where(self.observer_enabled != 0, found, scale)
            with torch.no_grad():
                self.scale.copy_(scale.reshape(-1))
                self.initialized.copy_(torch.maximum(self.initialized, self.observer_enabled))
        return torch.where(self.enabled_on_device() != 0, self.rounded(weight, scale), weight)

    def _shape(self, weight: Tensor) -> list[int]:
        return [-1, *[1] * (weight.dim() - 1)] if self.qtype.axis == 0 else [1] * weight.dim()

    def _means(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` for each scale, in a shape that broadcasts against them."""
        means = values.mean() if self.qtype.axis is None else values.flatten(1).mean(1)
        return means.view(self._shape(values))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there.

        Forget whether the scale is set.
        """
        saved = state_dict.get(f"{prefix}scale")
        if isinstance(saved, Tensor) and saved.numel():
            self.allocate(saved.numel())
        self._qparams_known = False
        super()._load_from_state_dict(state_dict, prefix, *args)


class DoReFaWeight(WeightScheme):
    """DoReFa-Net's weights: ``2 round(n (t/2 + 1/2)) / n - 1`` with ``t = tanh(w) / max|tanh(w)|``, ``n = 2^bits - 1``.

    The gradient passes the rounding as it is, and goes on through tanh and the largest value. With one bit the weight
    is ``sign(w) mean|w|`` with ``sign(0) = 1``, and the gradient passes all of it.

    Args:
        bits: 1 to 7.

    Raises:
        ValueError: another number of bits.

    Source: Zhou et al., DoReFa-Net, 2016, equations 7 and 9.

    Examples:
        >>> DoReFaWeight(2)(torch.tensor([[-2.0, -0.1, 0.3, 1.0]]))
        tensor([[-1.0000, -0.3333,  0.3333,  1.0000]])
    """

    def __init__(self, bits: int) -> None:
        whole = whole_number(bits)
        if whole is None or not 1 <= whole <= _MOST_BITS:
            raise ValueError(f"DoReFa weights have 1 to {_MOST_BITS} bits, got {bits!r}")
        super().__init__(2**whole - 1, None)
        self.bits = whole

    def scale_of(self, weight: Tensor) -> Tensor:
        """Return ``1 / (2^bits - 1)``, or with one bit the mean of ``|weight|``.

        Its shape is (1, 1, …), with as many axes as the weight. With more bits codes are
        ``2 round(n (t/2 + 1/2)) - n``, every second integer from -n to n, so that neighbouring values lie two scales
        apart.
        """
        if self.bits == 1:
            return self._means(weight.detach().abs())
        return weight.new_full(self._shape(weight), 1 / self.qtype.quant_max)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return ``(2 round(n (t/2 + 1/2)) - n) · scale``, with t and n of the class; its gradient is that of ``t``.

        ``scale`` is ``1/n``, as :meth:`scale_of` returns it, and gets no gradient. With one bit the result is
        ``sign(weight) · scale`` with the mean magnitude as scale, and the gradient passes unchanged.
        """
        if self.bits == 1:
            return with_gradient_of(torch.where(weight < 0, -scale, scale), weight)
        squashed = torch.tanh(weight)
        squashed = squashed / squashed.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        levels = self.qtype.quant_max
        codes = 2 * (levels * (squashed.detach() / 2 + 0.5)).round() - levels
        return with_gradient_of(codes * scale, squashed)


class DoReFaActivation(FakeQuantize):
    """DoReFa-Net's activations: ``round(n clip(x, 0, 1)) / n`` with ``n = 2^bits - 1``.

    The gradient passes where ``0 <= x <= 1``. The first layer reads values below zero: it wants another quantizer.

    Args:
        bits: of the codes, 1 to 32.

    Raises:
        TypeError, ValueError: ``bits`` is no whole number, or out of range.

    Source: Zhou et al., DoReFa-Net, 2016, equations 5, 6 and 11.

    Examples:
        >>> DoReFaActivation(2)(torch.tensor([-0.3, 0.2, 0.6, 1.4]))
        tensor([0.0000, 0.3333, 0.6667, 1.0000])
    """

    def __init__(self, bits: int) -> None:
        super().__init__(PassiveObserver, dtype=QuantizedType.of(bits, signed=False, symmetric=False))
        cast(PassiveObserver, self.activation_post_process).set_qparams(1 / self.qtype.quant_max, 0)

    def quantize(self, x: Tensor) -> Tensor:
        """Clip ``x`` to ``[0, 1]`` and round it to multiples of ``1 / (2^bits - 1)``; with rounding off, do neither."""
        return super().quantize(torch.where(self.fake_quant_enabled != 0, x.clamp(0, 1), x))


class BinaryWeight(WeightScheme):
    """XNOR-Net's weights: ``a sign(w)`` with ``a = mean|w|`` of each output channel, and ``sign(0) = 1``.

    Gradient: ``dw = dy (1/n + a [|w| < 1])``, with n the number of weights that share ``a``, as the paper has it.

    Args:
        ch_axis: 0, as in the paper, or None for one ``a``, the mean of the whole weight.

    Raises:
        ValueError: another axis.

    Source: Rastegari et al., XNOR-Net, 2016, section 3.1.

    Examples:
        >>> BinaryWeight()(torch.tensor([[-2.0, 1.0], [0.5, 0.25]]))
        tensor([[-1.5000,  1.5000],
                [ 0.3750,  0.3750]])
    """

    def __init__(self, ch_axis: int | None = 0) -> None:
        super().__init__(1, ch_axis)

    def scale_of(self, weight: Tensor) -> Tensor:
        """Return the mean of ``|weight|``, of each output channel or, if ``ch_axis`` is None, of the tensor.

        It broadcasts against the weight: (channels, 1, …), or (1, 1, …) for the tensor. It has no gradient.
        """
        return self._means(weight.detach().abs())

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return ``sign(weight) * scale``; the weight's gradient is ``dy (1/n + scale [|weight| < 1])``.

        ``scale`` broadcasts against ``weight``: it is (channels, 1, …), or (1, 1, …) per tensor. n is the number of
        weights that share a scale.
        """
        fixed = weight.detach()
        slope = scale.numel() / weight.numel() + scale * (fixed.abs() < 1)
        return with_gradient_of(torch.where(fixed < 0, -scale, scale), weight * slope)


class TernaryWeight(WeightScheme):
    """Ternary weight networks: ``a sign(w)`` where ``|w| > 0.7 mean|w|``, else 0; ``a`` is the mean of those ``|w|``.

    The gradient passes as it is.

    Args:
        ch_axis: None, as in the paper, or 0 for one threshold and scale per output channel.

    Raises:
        ValueError: another axis.

    Source: Li, Zhang and Liu, Ternary Weight Networks, 2016, equations 5 and 6.

    Examples:
        >>> TernaryWeight()(torch.tensor([[-2.0, 1.0, 0.1, 1.5]]))
        tensor([[-1.5000,  1.5000,  0.0000,  1.5000]])
    """

    def __init__(self, ch_axis: int | None = None) -> None:
        super().__init__(1, ch_axis)

    def _codes(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        return weight.detach().sign() * (size > 0.7 * self._means(size))

    def scale_of(self, weight: Tensor) -> Tensor:
        """Return the mean of those ``|weight|`` that are larger than 0.7 times the mean of all; 1 if none is.

        Both means are of the tensor, (1, 1, …), or with ``ch_axis`` 0 of each output channel, (channels, 1, …).
        """
        large = self._codes(weight).abs()
        share = self._means(large)
        found = self._means(weight.detach().abs() * large) / torch.where(share == 0, 1, share)
        return torch.where(share == 0, 1, found)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return ``scale``, 0 or ``-scale`` for each value of ``weight``; the gradient passes unchanged."""
        return with_gradient_of(self._codes(weight) * scale, weight)
