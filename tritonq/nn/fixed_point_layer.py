"""The base class of fixed-point layers, and the format of the tensors that they read.

A layer's input is the real activation divided by the layer's scaling factor η, so that its 8-bit fixed-point form
covers the clipping level α: ``η = 2^fl * |α| / levels``, with fl the fractional length (bits behind the binary point).
A layer divides its output by the η of the layer that follows.

:func:`tritonq.set_fixed_point_phase` sets the *phase* of all: "fixed" rounds, "floating" clips without rounding,
"floating_wo_clip" is the float network, without scaling factors.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.linear_map import LinearMap
from tritonq.nn.qat import linear_map_of
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig, get_qconfig
from tritonq.reference.fixed_point import power_of_two
from tritonq.reference.int8_conv import ACCUMULATOR_MAX

_INITIAL_ALPHA = 8.0


class ActivationFormat(FixedPointFakeQuantize):
    """The fixed-point format of a tensor that layers read, with its learned clipping level α.

    Its scaling factor is ``η = 2^fl * |α| / levels``, with fl the rounded running fractional length, ``levels =
    2^(wl-signed) - 1`` and wl the word length. The tensor holds real values divided by η, and a code counts steps of
    ``|α| / levels``.

    Args:
        like: the quantizer whose ``word_len``, ``momentum`` and ``choice`` (how a batch's fractional length is found)
            are taken.
        signed: whether the tensor has negative values; if not, rounding it is its ReLU.
        scaled: False for a network's input, which holds real values: η is 1.

    Attributes:
        alpha: parameter (1,), initially 8. Formats may share it; their η then differ only by powers of two.
        levels: the float that α is divided by: the number above, or that of the format whose α this one shares, even if
            that format has another sign (:meth:`share_step`).

    Source: docs/fixed-point.md.
    """

    alpha: nn.Parameter

    def __init__(self, like: FixedPointFakeQuantize, signed: bool = False, scaled: bool = True) -> None:
        super().__init__(like.word_len, signed, None, like.momentum, like.choice)
        self.scaled = scaled
        self.levels = float(self.qtype.quant_max)
        self.alpha = nn.Parameter(torch.full((1,), _INITIAL_ALPHA), requires_grad=scaled)

    def share_step(self, other: ActivationFormat) -> None:
        """Share the parameter α of ``other`` and take its ``levels``, so that both have the step ``|α| / levels``.

        Their η then differ only by a power of two. This format's former α is dropped.
        """
        self.alpha, self.levels = other.alpha, other.levels

    def eta(self) -> Tensor:
        """Return the scaling factor η, 0-d, in α's dtype and differentiable in α; 1 if ``scaled`` is False.

        It does not depend on the phase: in ``"floating_wo_clip"`` the layers leave it out.
        """
        if not self.scaled:
            return self.alpha.new_ones(())
        power = power_of_two(self.rounded_frac_len(), torch.float64).to(self.alpha.dtype)
        return (power * self.alpha.abs() / self.levels).view(())

    def power_between(self, following: ActivationFormat) -> Tensor:
        """Return ``η / η_following``, which is ``2^(fl - fl_following)``: float64 (1,), without gradient.

        Both formats must be ``scaled`` and have one step (:meth:`share_step`); neither is checked.
        """
        return power_of_two(self.rounded_frac_len() - following.rounded_frac_len(), torch.float64)

    def read(self, x: Tensor, observes: bool) -> Tensor:
        """Return ``x`` rounded to the format: ``clamp(round(x * 2^fl), lo, hi) * 2^-fl``.

        lo..hi is ``-(2^(wl-1) - 1)..2^(wl-1) - 1`` if the format is signed, else ``0..2^wl - 1``. fl is that of the
        batch in training, and the rounded running one in eval mode.
        In phase ``"floating"`` the result is ``x`` clipped to ``lo * 2^-fl..hi * 2^-fl``, not rounded. In phase
        ``"floating_wo_clip"`` it is the ReLU of ``x``, if the format is unsigned, else ``x`` itself. In the other
        phases it has the values of ``x`` while ``fake_quant_enabled`` is 0, and in eval mode until a training batch was
        observed or a fractional length loaded.

        Args:
            x: the tensor, divided by η; in phase ``"floating_wo_clip"`` real values.
            observes: whether this reader of the tensor is the first, and so observes it in training; later readers
                round with the fractional length that the first one found.
        """
        return self(x) if observes or self.phase == "floating_wo_clip" or self._is_unseen() else self.quantize(x)

    def _is_unseen(self) -> bool:
        """Whether, in eval mode outside of ``torch.compile``, nothing has been observed yet."""
        # A graph can't ask; rounding then asks on the device.
        return not self.training and not torch.compiler.is_compiling() and not self.has_qparams()

    def extra_repr(self) -> str:
        """Return the base class's text for ``repr`` and α, and "unscaled" if η is 1 (``scaled=False``)."""
        return f"{super().extra_repr()}, alpha={float(self.alpha.detach()):.4g}" + ("" if self.scaled else ", unscaled")


class FixedPointIntegers(NamedTuple):
    """The integers of a layer: ``accumulator = Σ input code * weight + bias``; one unit of it is worth ``2^-frac_len``.

    Attributes:
        weight: codes, integer-valued float64, in the weight's shape.
        bias: codes, integer-valued float64 (out,); 0 without a bias.
        frac_len: int32 (out,): fractional length of input plus that of weight.
    """

    weight: Tensor
    bias: Tensor
    frac_len: Tensor


class FixedPointLayer(ReferringModule):
    """A convolution or linear layer ``op`` on fixed-point input with a fixed-point weight.

    ``op(xq, FQ(W η/η_next)) + b/η_next`` with xq the rounded input, FQ rounding to fixed point, and η_next the scaling
    factor of the layer that follows (1: none follows).

    Attributes:
        input_format: format of the input, with α and η of this layer.
        weight_fake_quant: rounds the weight; its fractional length is chosen anew in every forward.
        observes: whether this layer is the first reader of its input, and so observes it in training.
        input_factor: constant to be multiplied into the weight, from an average pooling before this layer; else 1.
        bias_word_len: eval rounds the bias to this many bits at the accumulator's fractional length; None: not at all.
        raw_output: whether an addition reads the output without rounding it first; `prepare_qat` sets it.
    """

    weight: Tensor
    bias: Tensor | None
    input_format: ActivationFormat
    weight_fake_quant: FixedPointFakeQuantize

    raw_output: bool = False
    _references = ("_following",)

    def attach_formats(self, qconfig: QConfig | None, signed_input: bool, bias_word_len: int | None) -> None:
        """Create the formats of input and weight by ``qconfig``, and set the other attributes, with no layer following.

        Constructors call it when the weight is there. ``observes`` becomes True, and ``input_factor`` 1.

        Args:
            qconfig: two :class:`FixedPointFakeQuantize` factories; None: preset ``"f8net"``.
            signed_input: whether the input has negative values.
            bias_word_len: bits of the bias in eval mode; None: a float bias.

        Raises:
            ValueError: a qconfig whose quantizers aren't fixed point, a weight format that is unsigned or per another
                axis than 0, a bias of other than 2 to 32 bits.
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
        """Move the quantizer of the weight and the format of the input to ``device``."""
        self.weight_fake_quant.to(device)
        self.input_format.to(device)

    @property
    def following(self) -> ActivationFormat | None:
        """The format in which this layer's output is read; None if the network returns it, divided by no factor."""
        return self._following.module

    def set_following(self, following: FixedPointLayer | ActivationFormat | None) -> None:
        """Set the layer or format ``following`` that reads the output, by whose η the output is divided.

        None: the network returns the output, as real values.
        """
        self._following = Reference(following.input_format if isinstance(following, FixedPointLayer) else following)

    def eta_next(self) -> Tensor:
        """Return η_next, by which the output is divided: 0-d, in the weight's dtype; 1 if :attr:`following` is None."""
        following = self.following
        return self.weight.new_ones(()) if following is None else following.eta().to(self.weight.dtype)

    @property
    def linear_map(self) -> LinearMap:
        """The function of input, weight and bias (or None) that the layer computes: its convolution or product."""
        return linear_map_of(self)

    @abstractmethod
    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias (None: there is none) for an input divided by η and an output divided by η_next.

        Neither is rounded; both are differentiable. ``input_factor`` is multiplied into the weight. A BatchNorm is
        folded in with its running statistics. The phase makes no difference; the forward of "floating_wo_clip" takes
        the layer's own weight and bias instead.
        """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, divided by the next layer's η, for an input that is divided by this layer's η.

        The input is rounded first, to xq. Training computes ``op(xq, FQ(weight)) + bias`` in float, with weight and
        bias of :meth:`effective_parameters`. Eval mode computes it in exact integers, with the same gradient, if input
        and weight are rounded and ``bias_word_len`` is given. In phase "floating_wo_clip" it is the float layer.

        Outputs that are computed in integers are float64 between layers: a 32-bit accumulator must not be rounded
        before the next layer rounds it to 8 bits. If no layer follows, they have the weight's dtype.
        """
        rounded = self.input_format.read(input, self.observes)
        if self.input_format.phase == "floating_wo_clip":
            return self.float_forward(rounded.to(self.weight.dtype))
        if self.training or not self.is_integer():
            return self.fixed_forward(rounded.to(self.weight.dtype))
        exact = self.exact_forward(rounded)
        needs_grad = needs_gradient(self, input)
        if not needs_grad and not torch.compiler.is_compiling():
            return exact
        surrogate = self.fixed_forward(rounded.to(self.weight.dtype)).to(exact.dtype)
        if torch.compiler.is_compiling():
            exact = torch.where(self._integer_switch() != 0, exact, surrogate.detach())
        # A copy, since the model's own next operation may work in place, which autograd forbids on the result.
        return with_gradient_of(exact, surrogate).clone() if needs_grad else exact

    def float_forward(self, x: Tensor) -> Tensor:
        """Return ``op(x, weight) + bias`` in float for real values ``x``, without rounding, clipping and factors.

        It runs while the input's format is in the phase "floating_wo_clip". ``input_factor`` is not used.
        """
        return self.linear_map(x, self.weight, self.bias)

    def fixed_forward(self, x: Tensor) -> Tensor:
        """Return ``op(x, FQ(weight)) + bias`` with weight and bias of :meth:`effective_parameters`; differentiable.

        ``x`` is the input after rounding, in units of η. FQ is :meth:`rounded_weight`; the bias is not rounded.
        """
        weight, bias = self.effective_parameters()
        return self.linear_map(x, self.rounded_weight(weight), bias)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` in fixed point, with the fractional length that suits it best now; differentiable (STE).

        ``choice`` of ``weight_fake_quant`` says what suits best. In training the length is written to its buffer
        ``batch_frac_len``. In phase "floating" the weight is clipped only; while rounding is off its values stay.
        """
        quantizer = self.weight_fake_quant
        frac_len = quantizer.choose(weight)
        if self.training:
            quantizer.batch_frac_len.copy_(frac_len)
        return quantizer.round_to(weight, frac_len)

    def is_integer(self) -> bool:
        """Whether eval mode computes in integers: input and weight are rounded, and so is the bias.

        That is in the phase "fixed" with a ``bias_word_len``, while rounding is switched on and a fractional length of
        the input is known; whether the layer is in eval mode does not count. Reads switches from the device. While
        ``torch.compile`` traces, only phase and ``bias_word_len`` count: the graph reads the rest when it runs.
        """
        if self.weight_fake_quant.phase != "fixed" or self.bias_word_len is None:
            return False
        if torch.compiler.is_compiling():
            return self.input_format.phase == "fixed"
        return self.input_format.is_enabled_on_host() and self.weight_fake_quant.is_switched_on_host()

    def _integer_switch(self) -> Tensor:
        """Return the part of :meth:`is_integer` that a graph decides on the device: uint8 (1,), 1 for integers."""
        return self.input_format.enabled_on_device() * self.weight_fake_quant.fake_quant_enabled

    @torch.no_grad()
    def integers(self) -> FixedPointIntegers:
        """Return the integers that eval mode and the deployed layer compute with: codes of weight and bias.

        They are ``round(w 2^fl_w)`` and ``round(b 2^(fl_x + fl_w))``, clamped to their bits, of the effective
        parameters; the fractional length of the accumulator is ``fl_x + fl_w``. A layer with a bias must have a
        ``bias_word_len``. The phase must be "fixed" and rounding switched on: else the weights are no integers.
        """
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
        """Return ``clamp(Σ input code · weight code + bias code, ±(2^31 - 1)) · 2^-frac_len``, exact in float64.

        ``x`` is the input after rounding, in units of η. Codes of weight and bias, and the accumulator's frac_len, are
        those of :meth:`integers`, whose conditions hold here too. The result has no gradient; it is float64 if a layer
        follows, else it has the weight's dtype.
        """
        layer = self.integers()
        codes = x.double() * power_of_two(self.input_format.rounded_frac_len(), torch.float64)
        shape = [1] * codes.dim()
        shape[self.linear_map.output_axis] = -1
        total = self.linear_map(codes, layer.weight) + layer.bias.view(shape)
        y = total.clamp_(-ACCUMULATOR_MAX, ACCUMULATOR_MAX) * power_of_two(-layer.frac_len, torch.float64).view(shape)
        return y if self.following is not None else y.to(self.weight.dtype)

    def _unnormalised_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return ``input_factor · W η / η_next`` and ``b / η_next`` (or None): those of a layer without BatchNorm."""
        eta_next = self.eta_next()
        ratio = self.input_factor * self.input_format.eta().to(self.weight.dtype) / eta_next
        return self.weight * ratio, None if self.bias is None else self.bias / eta_next
