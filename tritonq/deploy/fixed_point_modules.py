"""The modules of a converted fixed-point network: 8-bit codes in and out, 32-bit accumulators, shifts.

A code stands for ``code · 2^-frac_len``. An *accumulator* is the integer sum of a layer, before it is shifted to codes.
All arithmetic between the codes of the network's input and those of its output is on integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.deploy.modules import DeployedModule
from tritonq.functional.dispatch import implementation
from tritonq.qparams import is_readable
from tritonq.reference.fixed_point import power_of_two
from tritonq.reference.int8_conv import ACCUMULATOR_MAX, requantize
from tritonq.warn_once import warn_once


@dataclass(frozen=True)
class FixedPointFormat:
    """The codes of a tensor: ``code · 2^-frac_len`` is the real value divided by η, a factor that was trained.

    For the network's input η is 1.

    Attributes:
        frac_len: fractional length.
        quant_min: smallest code.
        quant_max: largest code.
    """

    frac_len: int
    quant_min: int
    quant_max: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes, int8 if ``quant_min`` is negative, else uint8."""
        return torch.int8 if self.quant_min < 0 else torch.uint8

    @property
    def largest(self) -> int:
        """Largest magnitude of a code, ``max(-quant_min, quant_max)``: 127 for codes -127..127."""
        return max(-self.quant_min, self.quant_max)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of real values, in :attr:`dtype`: ``clamp(round_half_even(x · 2^frac_len), lo, hi)``.

        lo and hi are ``quant_min`` and ``quant_max``; NaN becomes 0. The network's input becomes integers here.
        """
        code = (x.double() * 2.0**self.frac_len).round_().clamp_(self.quant_min, self.quant_max)
        return code.nan_to_num_(nan=0.0).to(self.dtype)


class IntegerModule(DeployedModule):
    """A module that takes codes or accumulators and returns codes or accumulators.

    Attributes:
        output: format of the codes that it returns; None: it returns int32 accumulators.
        frac_len: int32 buffer (channels,) or (1,): fractional lengths of its accumulators.
        saturated: int64 buffer (1,): how many accumulators were clamped to ±(2^31 - 1) so far. Convolutions and linear
            layers have it in their state dict, others don't.
        name: path of the module in the network, for messages; ``""`` at first.
        bound: int, upper bound of the magnitude of its accumulators, before they are clamped.
    """

    frac_len: Tensor
    saturated: Tensor
    output: FixedPointFormat | None
    name: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled module; additions and averages of version 0.2.0 lack ``saturated``, which is added."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "saturated" not in self._buffers:
            self._start_count()

    def _start_count(self) -> None:
        """Register the buffer ``saturated``, 0, outside of the state dict."""
        device = self.frac_len.device
        self.register_buffer("saturated", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    @property
    def shift(self) -> Tensor | None:
        """How many bits accumulators are shifted right to become codes, ``frac_len - output.frac_len``.

        int32, shaped as ``frac_len``; a negative number shifts left. None: ``output`` is None, they stay accumulators.
        """
        return None if self.output is None else self.frac_len - self.output.frac_len

    def rounded(self, total: Tensor, channel_axis: int = 1) -> Tensor:
        """Return accumulators as codes of the output: ``clamp(round_half_even(total · 2^-shift))``, int8 or uint8.

        The codes, shaped as ``total``, are clamped to the output's ``quant_min`` and ``quant_max``. Without an output
        format the accumulators are returned as int32, clamped to ±(2^31 - 1); ``saturated`` counts those that were, and
        a RuntimeWarning tells of them, once per module. ``total`` is int32 or int64, and ``channel_axis`` its axis of
        the channels.
        """
        if self.output is None or self.shift is None:
            if total.dtype == torch.int64:
                self.saturated.add_((total.abs() > ACCUMULATOR_MAX).sum())
                self.warn_if_saturated()
            return total.clamp(-ACCUMULATOR_MAX, ACCUMULATOR_MAX).to(torch.int32)
        shape = [1] * total.dim()
        shape[channel_axis] = -1
        output = self.output
        return requantize(total, self.shift.view(shape), output.quant_min, output.quant_max).to(output.dtype)

    def warn_if_saturated(self) -> None:
        """Warn (RuntimeWarning), once per module, if accumulators were clamped.

        Nothing is done while ``torch.compile`` traces, and where the count lies on a GPU, which is not read here.
        """
        if is_readable(self.saturated) and int(self.saturated):
            warn_once(
                self,
                f"{int(self.saturated)} accumulators of {self.name!r} passed 32 bits and were clamped to ±(2^31 - 1)",
                RuntimeWarning,
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """Return the text for ``repr``: the format of the output, or ``"to int32 accumulators"``."""
        return "to int32 accumulators" if self.output is None else f"to {self.output}"


class IntegerLayer(IntegerModule):
    """A convolution or product of 8-bit codes: ``clamp(round_half_even((Σ x w + bias) · 2^-shift), lo, hi)``.

    Args:
        tensors: ``weight``, ``bias`` and ``frac_len`` (int32, (out,)) by name; they become buffers and are not copied.
        geometry: ``stride``, ``padding`` and ``dilation``, each (vertical, horizontal), and ``groups``.
        input: format of the input's codes.
        output: format of the codes that it returns; None: it returns int32 accumulators.
        encodes: whether the input is real and becomes codes here.
        decodes: whether it returns real values; ``output`` must be None then.
        linear: whether it is a linear layer, with inputs (..., in); else a convolution.

    Attributes:
        weight: int8 buffer, (out, in/groups, kh, kw); for a linear layer (out, in, 1, 1).
        bias: int32 buffer (out,); zeros for a layer without a bias.
        input: format of the input's codes.
        encodes: whether the input is real and becomes codes here: a layer that reads the network's input.
        decodes: whether it returns real values ``float32(acc) · 2^-frac_len``: one that makes the network's output.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        tensors: dict[str, Tensor],
        geometry: dict[str, Any],
        input: FixedPointFormat,
        output: FixedPointFormat | None,
        *,
        encodes: bool,
        decodes: bool,
        linear: bool,
    ) -> None:
        super().__init__()
        self.keep(**tensors, saturated=torch.zeros(1, dtype=torch.int64, device=tensors["weight"].device))
        self.geometry, self.input, self.output = geometry, input, output
        self.encodes, self.decodes, self.linear = encodes, decodes, linear
        self.read_tensors()
        self.eval()

    def read_tensors(self) -> None:
        """Set ``bound``, the largest magnitude that an accumulator can have; called after each load.

        It is the largest ``Σ |w| · input.largest + |bias|`` of an out channel.
        """
        rows = self.weight.to(torch.int64).abs().flatten(1).sum(1) * self.input.largest
        self.bound = int((rows + self.bias.to(torch.int64).abs()).max())

    def accumulate(self, codes: Tensor) -> Tensor:
        """Return the result for input codes (n, c, h, w): codes if ``output`` is a format, else int32 accumulators.

        The result is (n, out, h', w'). Codes are int8, or uint8 if their format has no negative codes. Accumulators are
        clamped to ±(2^31 - 1). If ``bound`` is above that, those clamped are counted in ``saturated``, and a
        RuntimeWarning tells of them, once per layer. A linear layer takes and returns h, w = 1, 1 here.
        """
        ops = implementation("int8_conv", codes)
        low, high, dtype = 0, 0, torch.int32
        if self.output is not None:
            low, high, dtype = self.output.quant_min, self.output.quant_max, self.output.dtype
        saturated = self.saturated if self.bound > ACCUMULATOR_MAX else None
        result: Tensor = ops.int8_conv2d(
            codes,
            self.weight,
            self.bias,
            self.shift,
            **self.geometry,
            quant_min=low,
            quant_max=high,
            out_dtype=dtype,
            saturated=saturated,
        )
        # In a compiled graph the operator warns by itself.
        if saturated is not None:
            self.warn_if_saturated()
        return result

    def forward(self, input: Tensor) -> Tensor:
        """Return codes, or accumulators, for input codes; the first layer takes, and the last returns, real values.

        ``input`` is (n, c, h, w) for a convolution, and the result (n, out, h', w'); for a linear layer (..., in) and
        (..., out). Codes are int8 or uint8, as their format says (:attr:`FixedPointFormat.dtype`); accumulators
        are int32, and returned real values float32.
        """
        codes = self.input.encode(input) if self.encodes else input
        if self.linear:
            flat = codes.reshape(-1, codes.shape[-1], 1, 1)
            y = self.accumulate(flat)
            y = y.view(*codes.shape[:-1], y.shape[1])
        else:
            y = self.accumulate(codes)
        return self.decode(y) if self.decodes else y

    def decode(self, accumulators: Tensor) -> Tensor:
        """Return the real values of accumulators, ``acc · 2^-frac_len`` per out channel, rounded to float32 once.

        ``accumulators`` is (n, out, h, w) for a convolution, (..., out) for a linear layer.
        """
        shape = [1] * accumulators.dim()
        shape[-1 if self.linear else 1] = -1
        return (accumulators.double() * power_of_two(-self.frac_len, torch.float64).view(shape)).float()

    def extra_repr(self) -> str:
        """Return the text for ``repr``: "linear" or the geometry, the weight's shape, formats of input and output.

        "encodes" and "decodes" follow where these are true.
        """
        kind = "linear" if self.linear else f"conv {self.geometry}"
        ends = (", encodes" if self.encodes else "") + (", decodes" if self.decodes else "")
        return f"{kind}, weight {tuple(self.weight.shape)}, from {self.input}, {super().extra_repr()}{ends}"


class IntegerAdd(IntegerModule):
    """The sum of two tensors of codes or accumulators: ``(a << left0) + (b << left1)``.

    All channels of both are shifted left to one fractional length, the largest that any of these channels has. With an
    output format the sum then becomes 8-bit codes, ``clamp(round_half_even(sum · 2^-shift))`` with the :attr:`shift` of
    the base class; without one (``output`` None) it is returned as an int32 accumulator, clamped to ±(2^31 - 1).

    Args:
        frac_lens: fractional lengths of the two summands, int32 (channels,) or (1,) each.
        bounds: upper bounds of the magnitudes of both summands' integers, before they are shifted.
        output: format of the codes that it returns; None: it returns int32 accumulators.

    Attributes:
        bounds: as the argument.
        left0: int32 buffer (channels,) or (1,): how many bits the first summand is shifted; ``left1`` for the second.
        wide: whether the aligned sum may pass 32 bits, by ``bounds`` and shifts, so that it is computed in 64.
    """

    left0: Tensor
    left1: Tensor

    def __init__(
        self, frac_lens: tuple[Tensor, Tensor], bounds: tuple[int, int], output: FixedPointFormat | None
    ) -> None:
        super().__init__()
        finest = torch.maximum(frac_lens[0].max(), frac_lens[1].max()).view(1)
        self.keep(left0=finest - frac_lens[0], left1=finest - frac_lens[1], frac_len=finest)
        self.output, self.bounds = output, bounds
        lefts = (int(self.left0.max()), int(self.left1.max()))
        self.bound = sum(bound << left for bound, left in zip(bounds, lefts, strict=True))
        self.wide = self.bound > ACCUMULATOR_MAX
        self._start_count()
        self.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of two integer tensors (n, c, ...) of one shape, in this shape.

        It is codes, int8 or uint8, or int32 accumulators without an output format.
        """
        dtype = torch.int64 if self.wide else torch.int32
        shape = [1, -1, *[1] * (a.dim() - 2)]
        total = (a.to(dtype) << self.left0.view(shape)) + (b.to(dtype) << self.left1.view(shape))
        return self.rounded(total)


@dataclass(frozen=True)
class PoolingWindow:
    """The elements that an average is taken over.

    Attributes:
        kernel_size: (height, width); None: the whole image.
        stride: (vertical, horizontal); None with the whole image.
        padding: zeros on each side, (vertical, horizontal), which count as values.
        area: number of values in the window; of the whole image its pixels.
        keepdim: whether the average of a whole image keeps its two axes, with size 1.
    """

    kernel_size: tuple[int, int] | None
    stride: tuple[int, int] | None
    padding: tuple[int, int]
    area: int
    keepdim: bool


class IntegerAvgPool2d(IntegerModule):
    """The average of windows of codes: their sum, whose fractional length includes the division by a power of two.

    A sum S stands for ``S · 2^-frac_len``: the average, if the window's area is a power of two; else what is missing,
    the nearest power of two over the area, is a factor of the next layer's weights. With an output format S becomes a
    code by ``clamp(round_half_even(S · 2^-shift))``.

    Args:
        window: size, stride and padding of the windows.
        frac_len: fractional length of the sums, int32 (channels,) or (1,).
        input: format of the input's codes.
        output: format of the codes that it returns; None: it returns int32 accumulators.
    """

    def __init__(
        self, window: PoolingWindow, frac_len: Tensor, input: FixedPointFormat, output: FixedPointFormat | None
    ) -> None:
        super().__init__()
        self.window, self.input, self.output = window, input, output
        self.keep(frac_len=frac_len)
        self.bound = window.area * input.largest
        self._start_count()
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """Return the averages of codes (n, c, h, w), as codes, or as int32 sums without an output format.

        The result is (n, c, h', w'); that of a window of the whole image is (n, c, 1, 1), without ``keepdim`` (n, c).

        Raises:
            ValueError: the window is the whole image, and the image has not ``window.area`` pixels.
        """
        window, dtype = self.window, torch.int64 if self.bound > ACCUMULATOR_MAX else torch.int32
        if window.kernel_size is None:
            if input.shape[-1] * input.shape[-2] != window.area:
                raise ValueError(
                    f"this average was converted for images of {window.area} values, got {tuple(input.shape)}"
                )
            return self.rounded(input.sum((2, 3), keepdim=window.keepdim, dtype=dtype))
        (down, right), (height, width) = cast("tuple[int, int]", window.stride), window.kernel_size
        (above, left) = window.padding
        windows = nn.functional.pad(input, (left, left, above, above)).unfold(2, height, down).unfold(3, width, right)
        return self.rounded(windows.sum((4, 5), dtype=dtype))


def overflow_report(model: nn.Module) -> dict[str, int]:
    """Return how many accumulators were clamped to ±(2^31 - 1) so far, by the name of the module that summed them.

    Modules without clamped accumulators are left out. Convolutions and linear layers count them across a state dict,
    additions and average poolings from zero on. ``{}`` for a model that is no converted fixed-point network.
    """
    counts = {name: int(part.saturated) for name, part in model.named_modules() if isinstance(part, IntegerModule)}
    return {name: count for name, count in counts.items() if count}
