"""What fixed-point layers share: the format of what they read, and linear operations in fixed point.

A layer's input is the real activation divided by the layer's scaling factor η, so that its 8-bit fixed-point form
covers the clipping level α: ``η = 2^fl * |α| / levels``. A layer divides its output by the η of the layer that follows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.functional.fake_quant import with_gradient_of
from tritonq.functional.linear_map import LinearMap
from tritonq.nn.qat import linear_map_of
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig, get_qconfig
from tritonq.reference.fixed_point import power_of_two
from tritonq.reference.int8_conv import ACCUMULATOR_MAX

_INITIAL_ALPHA = 8.0


class ActivationFormat(FixedPointFakeQuantize):
    """The fixed-point format of a tensor that layers read, with its learned clipping level.

    Scaling factor ``η = 2^fl * |α| / levels`` with the rounded running fl and ``levels = 2^(wl-signed) - 1``: the
    tensor holds real values divided by η, and a code counts steps of ``|α| / levels``.

    Args:
        like: the quantizer whose word length, momentum and choice are used.
        signed: whether the tensor has negative values; if not, rounding it is its ReLU.
        scaled: False for a network's input, which holds real values: η is 1.

    Attributes:
        alpha: parameter (1,), initially 8. Formats may share it; their values then differ by powers of two alone.
        levels: what α is divided by; shared with α.

    Source: docs/fixed-point.md.
    """

    alpha: nn.Parameter

    def __init__(self, like: FixedPointFakeQuantize, signed: bool = False, scaled: bool = True) -> None:
        super().__init__(like.word_len, signed, None, like.momentum, like.choice)
        self.scaled = scaled
        self.levels = float(self.qtype.quant_max)
        self.alpha = nn.Parameter(torch.full((1,), _INITIAL_ALPHA), requires_grad=scaled)

    def share_step(self, other: ActivationFormat) -> None:
        """Use the step ``|α| / levels`` of another format: their η then differ by a power of two."""
        self.alpha, self.levels = other.alpha, other.levels

    def eta(self) -> Tensor:
        """Return the scaling factor, 0-d, differentiable in α."""
        if not self.scaled:
            return self.alpha.new_ones(())
        power = power_of_two(self.rounded_frac_len(), torch.float64).to(self.alpha.dtype)
        return (power * self.alpha.abs() / self.levels).view(())

    def power_between(self, following: ActivationFormat) -> Tensor:
        """Return ``η / η_following`` of two formats with one step: ``2^(fl - fl_following)``, float64 (1,)."""
        return power_of_two(self.rounded_frac_len() - following.rounded_frac_len(), torch.float64)

    def read(self, x: Tensor, observes: bool) -> Tensor:
        """Round ``x``; the first reader of a tensor observes it, later ones round with what that one found."""
        return self(x) if observes or self.phase == "floating_wo_clip" or self._is_unseen() else self.quantize(x)

    def _is_unseen(self) -> bool:
        # A graph can't ask; rounding then asks on the device.
        return not self.training and not torch.compiler.is_compiling() and not self.has_qparams()

    def extra_repr(self) -> str:
        """See base class; and α."""
        return f"{super().extra_repr()}, alpha={float(self.alpha.detach()):.4g}" + ("" if self.scaled else ", unscaled")


class FixedPointIntegers(NamedTuple):
    """A layer in integers: ``accumulator = Σ input code * weight + bias``, worth ``2^-frac_len`` each.

    Attributes:
        weight: codes, integer-valued float64, shaped as the weight.
        bias: codes, integer-valued float64 (out,).
        frac_len: int32 (out,): fractional lengths of input and weight together.
    """

    weight: Tensor
    bias: Tensor
    frac_len: Tensor


class FixedPointLayer(ReferringModule):
    """A linear operation on fixed-point input with a fixed-point weight.

    Attributes:
        input_format: format of the input, with α and η of this layer.
        weight_fake_quant: rounds the weight; its fractional length is chosen anew in every forward.
        observes: whether this layer is the first reader of its input, which moves the running fractional length.
        input_factor: constant that an average pooling before this layer left to be multiplied into the weight.
        bias_word_len: eval rounds the bias to this many bits at the accumulator's fractional length; None: not at all.
        raw_output: whether the output isn't rounded before it is read: by an addition.
    """

    weight: Tensor
    bias: Tensor | None
    input_format: ActivationFormat
    weight_fake_quant: FixedPointFakeQuantize

    raw_output: bool = False
    _references = ("_following",)

    def attach_formats(self, qconfig: QConfig | None, signed_input: bool, bias_word_len: int | None) -> None:
        """Create the formats that ``qconfig`` describes; None takes the preset ``"f8net"``.

        Raises:
            ValueError: a qconfig whose quantizers aren't fixed point, a weight format per another axis than 0, a bias
                of other than 2 to 32 bits.
        """
        qconfig = get_qconfig("f8net") if qconfig is None else qconfig
        activation, weight = qconfig.activation(), qconfig.weight()
        if not isinstance(activation, FixedPointFakeQuantize) or not isinstance(weight, FixedPointFakeQuantize):
            raise ValueError(
                f"{type(self).__name__} needs fixed-point quantizers, such as get_qconfig('f8net'), got "
                f"{type(activation).__name__} and {type(weight).__name__}"
            )
        if weight.qtype.axis not in (None, 0) or not weight.signed:
            raise ValueError(f"weights are signed, with axis None (per layer) or 0 (per channel), got {weight.qtype}")
        if bias_word_len is not None and not 2 <= bias_word_len <= 32:
            raise ValueError(f"bias_word_len must be in 2..32 or None, got {bias_word_len}")
        weight.allocate(self.weight.shape[0])
        self.weight_fake_quant = weight
        self.input_format = ActivationFormat(activation, signed_input)
        self.observes = True
        self.input_factor = 1.0
        self.bias_word_len = bias_word_len
        self._following: Reference[ActivationFormat] = Reference()
        if self.weight.device.type != "meta":
            self.move_formats(self.weight.device)

    def move_formats(self, device: torch.device) -> None:
        """Put the formats on ``device``."""
        self.weight_fake_quant.to(device)
        self.input_format.to(device)

    @property
    def following(self) -> ActivationFormat | None:
        """The format of the layer that reads this layer's output; None: the output is real."""
        return self._following.module

    def set_following(self, following: FixedPointLayer | ActivationFormat | None) -> None:
        """Set the reader of the output, whose η this layer divides by; None: the output is the network's."""
        self._following = Reference(following.input_format if isinstance(following, FixedPointLayer) else following)

    def eta_next(self) -> Tensor:
        """Return the scaling factor of the following layer, 1 where there is none."""
        following = self.following
        return self.weight.new_ones(()) if following is None else following.eta().to(self.weight.dtype)

    @property
    def linear_map(self) -> LinearMap:
        """The convolution or product of input and weight that the layer computes, with its geometry."""
        return linear_map_of(self)

    @abstractmethod
    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight (not rounded) and bias that take the input in units of η to the output in units of η_next, in eval."""

    def forward(self, input: Tensor) -> Tensor:
        """Return values divided by this layer's η to values divided by the next one's; float64 between layers in eval.

        There an accumulator of 32 bits must not be rounded before the next layer rounds it to 8.
        """
        rounded = self.input_format.read(input, self.observes)
        if self.input_format.phase == "floating_wo_clip":
            return self.float_forward(rounded.to(self.weight.dtype))
        if self.training or not self.is_integer():
            return self.fixed_forward(rounded.to(self.weight.dtype))
        exact = self.exact_forward(rounded)
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if not needs_grad and not torch.compiler.is_compiling():
            return exact
        surrogate = self.fixed_forward(rounded.to(self.weight.dtype)).to(exact.dtype)
        if torch.compiler.is_compiling():
            exact = torch.where(self._integer_switch() != 0, exact, surrogate.detach())
        # A copy, since the model's own next operation may work in place, which autograd forbids on the result.
        return with_gradient_of(exact, surrogate).clone() if needs_grad else exact

    def float_forward(self, x: Tensor) -> Tensor:
        """Return the float layer."""
        return self.linear_map(x, self.weight, self.bias)

    def fixed_forward(self, x: Tensor) -> Tensor:
        """Return the layer on rounded input, with its weight rounded, differentiable."""
        weight, bias = self.effective_parameters()
        return self.linear_map(x, self.rounded_weight(weight), bias)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` in fixed point, with the fractional length that suits it now."""
        quantizer = self.weight_fake_quant
        frac_len = quantizer.choose(weight)
        if self.training:
            quantizer.batch_frac_len.copy_(frac_len)
        return quantizer.round_to(weight, frac_len)

    def is_integer(self) -> bool:
        """Whether eval computes in integers: both formats round (reads values from the device).

        In a traced graph: whether that is for :meth:`_integer_switch` to say.
        """
        if self.weight_fake_quant.phase != "fixed" or self.bias_word_len is None:
            return False
        if torch.compiler.is_compiling():
            return self.input_format.phase == "fixed"
        return self.input_format.is_enabled_on_host() and self.weight_fake_quant.is_switched_on_host()

    def _integer_switch(self) -> Tensor:
        """Return the part of :meth:`is_integer` that a graph asks on the device: uint8 (1,)."""
        return self.input_format.enabled_on_device() * self.weight_fake_quant.fake_quant_enabled

    @torch.no_grad()
    def integers(self) -> FixedPointIntegers:
        """Return the integers that eval mode and the deployed layer compute with."""
        weight, bias = self.effective_parameters()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        quantizer = self.weight_fake_quant
        weight_frac_len = quantizer.choose(weight)
        codes = quantizer.round_to(weight, weight_frac_len).double()
        shape = (-1, *[1] * (codes.dim() - 1))
        codes *= power_of_two(weight_frac_len, torch.float64).view(shape)
        frac_len = (self.input_format.rounded_frac_len() + weight_frac_len).expand(len(weight))
        bias_codes = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        if bias is not None:
            largest = 2 ** (cast(int, self.bias_word_len) - 1) - 1
            bias_codes = (bias.double() * power_of_two(frac_len, torch.float64)).round().clamp(-largest, largest)
        return FixedPointIntegers(codes, bias_codes, frac_len)

    @torch.no_grad()
    def exact_forward(self, x: Tensor) -> Tensor:
        """Compute the layer on rounded input, exactly, in integers of float64, which saturate at ±(2^31 - 1)."""
        layer = self.integers()
        codes = x.double() * power_of_two(self.input_format.rounded_frac_len(), torch.float64)
        shape = [1] * codes.dim()
        shape[self.linear_map.output_axis] = -1
        total = self.linear_map(codes, layer.weight) + layer.bias.view(shape)
        y = total.clamp_(-ACCUMULATOR_MAX, ACCUMULATOR_MAX) * power_of_two(-layer.frac_len, torch.float64).view(shape)
        return y if self.following is not None else y.to(self.weight.dtype)

    def _unnormalised_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return ``W η / η_next`` and ``b / η_next``: the parameters of a layer without BatchNorm."""
        eta_next = self.eta_next()
        ratio = self.input_factor * self.input_format.eta().to(self.weight.dtype) / eta_next
        return self.weight * ratio, None if self.bias is None else self.bias / eta_next
