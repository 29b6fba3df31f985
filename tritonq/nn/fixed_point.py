"""Fixed-point layers, as in F8Net: they multiply only 8-bit numbers, and scaling factors go from layer to layer.

In formulas η is the scaling factor of a layer's input, ``2^fl · |α| / levels`` of its child ``input_format`` (fl:
fractional length, α: learned clipping level, levels: largest code). η_next is that of the layer given to
``set_following``; without one it is 1, and the output is real. ``xq`` is the input, which comes divided by η, rounded
to its format. FQ rounds the weight to fixed point. A qconfig makes both by :class:`FixedPointFakeQuantize` factories:
``activation`` for the input, ``weight`` for the weight. The attribute ``input_factor`` of a layer is a constant from an
average pooling before it, by which the weight is multiplied; 1 without one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.functional.recomputation import normalize_once
from tritonq.nn import intrinsic
from tritonq.nn.batch_norm import batch_norm_state
from tritonq.nn.conv import check_float_type, conv_arguments
from tritonq.nn.conv_bn import checked_batch_norm
from tritonq.nn.fixed_point_layer import ActivationFormat, FixedPointLayer
from tritonq.qconfig import QConfig
from tritonq.reference.conv_bn import update_running_statistics

# Files of torch.save(model) name ActivationFormat here.
__all__ = ["ActivationFormat", "FixedPointConv2d", "FixedPointConvBn2d", "FixedPointLinear"]


class _FixedPointConvolution(FixedPointLayer, nn.Conv2d):
    """The base of both fixed-point convolutions."""

    def _check_geometry(self) -> None:
        """Raise ValueError unless groups and padding have a fixed-point form; set ``padding`` to numbers, one per axis.

        Allowed are one group or a depthwise convolution, and zeros as padding, as many on either side of an axis.
        """
        if self.groups not in (1, self.in_channels):
            raise ValueError(
                f"a fixed-point convolution has 1 group or is depthwise ({self.in_channels} groups), got {self.groups}"
            )
        if self.padding_mode != "zeros":
            raise ValueError(f"a fixed-point convolution pads with zeros, got padding_mode={self.padding_mode!r}")
        pairs = self._reversed_padding_repeated_twice
        if pairs[0::2] != pairs[1::2]:
            raise ValueError(f"padding={self.padding!r} pads unequally for kernel size {self.kernel_size}")
        self.padding = tuple(reversed(pairs[0::2]))


class FixedPointConv2d(_FixedPointConvolution):
    """``y = conv(xq, FQ(W η/η_next)) + b/η_next``: a convolution in fixed point.

    xq is the rounded input, which holds values divided by the layer's scaling factor η. FQ rounds to fixed point, and
    η_next is the factor of the layer that reads the output; 1 if the network returns it.

    Args:
        *args: arguments of ``nn.Conv2d``.
        qconfig: two :class:`FixedPointFakeQuantize` factories; None: preset ``"f8net"``.
        signed_input: whether the input has negative values. If not, rounding it is the ReLU before this layer.
        bias_word_len: bits of the bias in eval, 2 to 32; None: a float bias, which can't be deployed.
        **kwargs: named arguments of ``nn.Conv2d``.

    Raises:
        ValueError: grouped but not depthwise, padding with other values than zeros or unequal on two sides, a bias of
            other than 2 to 32 bits, or a qconfig that isn't fixed point, or whose weights are unsigned or per another
            axis than 0.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.FixedPointConv2d(2, 4, 3, signed_input=True, qconfig=tritonq.get_qconfig("f8net"))
        >>> layer(torch.randn(8, 2, 6, 6)).shape
        torch.Size([8, 4, 4, 4])
    """

    def __init__(
        self,
        *args: Any,
        qconfig: QConfig | None = None,
        signed_input: bool = False,
        bias_word_len: int | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_geometry()
        self.attach_formats(qconfig, signed_input, bias_word_len)

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return ``input_factor · W η / η_next`` and ``b / η_next`` (None without bias), not rounded."""
        return self._unnormalised_parameters()

    @classmethod
    def from_float(cls, mod: nn.Module) -> FixedPointConv2d:
        """Return the fixed-point form of ``mod``, in its mode; it shares the parameters and uses ``mod.qconfig``.

        Without a qconfig it uses the preset ``"f8net"``. Its input is unsigned (``signed_input=False``), and its bias
        has 32 bits in eval mode.

        Raises:
            TypeError: not an ``nn.Conv2d``, or one of a subclass.
            ValueError: groups, padding or a qconfig that the constructor refuses.
        """
        check_float_type(cls, mod, nn.Conv2d)
        layer = cls(**conv_arguments(cast(nn.Conv2d, mod)), qconfig=getattr(mod, "qconfig", None))
        return cast(FixedPointConv2d, _sharing(layer, mod).train(mod.training))


class FixedPointConvBn2d(_FixedPointConvolution):
    """A convolution and its BatchNorm in fixed point, by F8Net's double forward.

    With ``xq`` the rounded input, divided by the layer's scaling factor η, training computes ``y0 = conv(η xq, W) + b``
    in float for the batch statistics μ and v (which update the running ones, v unbiased). Then it computes ``y =
    conv(xq, W') + b'`` with ``W' = FQ(γ/σ(v) · W η/η_next)`` and ``b' = (β + γ(b - μ)/σ(v)) / η_next``; η_next is the
    factor of the layer that follows (1: none). ``σ(v)`` is ``sqrt(v + eps)``. Gradients flow through μ and v. Eval mode
    uses the running statistics, and computes in exact integers if ``bias_word_len`` is given. In training the
    convolution's bias changes the running mean, not the output.

    Args:
        *args: arguments of ``nn.Conv2d``.
        eps: of the BatchNorm.
        momentum: of the BatchNorm; None: running statistics are plain averages.
        qconfig: two :class:`FixedPointFakeQuantize` factories; None: preset ``"f8net"``.
        signed_input: whether the input has negative values. If not, rounding it is the ReLU before this layer.
        bias_word_len: bits of the bias in eval, 2 to 32; None: a float bias, which can't be deployed.
        **kwargs: named arguments of ``nn.Conv2d``.

    Shapes: as ``nn.Conv2d``. The child ``bn`` holds γ, β and the running statistics.

    Raises:
        ValueError: grouped but not depthwise, padding with other values than zeros or unequal on two sides, a qconfig
            that isn't fixed point, or whose weights are unsigned or per another axis than 0, or ``bias_word_len`` out
            of range.

    Source: docs/fixed-point.md.

    Examples:
        >>> import torch, tritonq
        >>> qconfig = tritonq.get_qconfig("f8net")
        >>> layer = tritonq.nn.FixedPointConvBn2d(2, 4, 3, bias=False, signed_input=True, qconfig=qconfig)
        >>> layer(torch.randn(8, 2, 6, 6)).shape, layer.bn.num_features
        (torch.Size([8, 4, 4, 4]), 4)
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        qconfig: QConfig | None = None,
        signed_input: bool = False,
        bias_word_len: int | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_geometry()
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        self.bn: Any = nn.BatchNorm2d(self.out_channels, eps, momentum, device=device, dtype=dtype)
        self.attach_formats(qconfig, signed_input, bias_word_len)

    def float_forward(self, x: Tensor) -> Tensor:
        """Return ``BN(conv(x, weight) + bias)`` in float for real values ``x``, without rounding and factors.

        It runs while the input's format is in the phase "floating_wo_clip". In training mode the BatchNorm uses this
        batch's statistics and updates the running ones. ``input_factor`` is not used.

        Raises:
            ValueError: in training mode, fewer than two values per channel.
        """
        return normalize_once(self.bn, self.linear_map(x, self.weight, self.bias))

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the layer with its BatchNorm, by the running statistics; neither is rounded.

        They are ``input_factor · γ/σ · W η/η_next`` and ``(β + γ(b - mean)/σ) / η_next``. ``input_factor`` is the
        constant that an average pooling before this layer leaves to be multiplied into the weight; without one it is 1.
        The bias is never None; b is 0 without one.
        """
        return self._normalised_parameters(self.bn.running_mean, self.bn.running_var)

    def fixed_forward(self, x: Tensor) -> Tensor:
        """Return ``conv(x, FQ(γ/σ · W η/η_next)) + (β + γ(b - mean)/σ) / η_next``; differentiable.

        ``x`` is the input after rounding, xq, in units of η. Here η is the input format's η times ``input_factor``. In
        training mean and variance are those of this batch's ``conv(η x, W) + b``, and the running statistics are
        updated; in eval mode, or with ``bn`` in eval mode, they are the running ones. It is computed in float.

        Raises:
            ValueError: layer and ``bn`` are in training mode, and there are fewer than two values per channel.
        """
        if not (self.training and self.bn.training):
            return super().fixed_forward(x)
        eta = self.input_format.eta().to(x.dtype) * self.input_factor
        y = self.linear_map(x * eta, self.weight, self.bias)
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        count = y.numel() // y.shape[1]
        if count < 2:
            raise ValueError(f"training needs more than 1 value per channel for its statistics, got {count}")
        with torch.no_grad():
            update_running_statistics(batch_norm_state(self.bn), mean, var, count)
        weight, bias = self._normalised_parameters(mean, var)
        return self.linear_map(x, self.rounded_weight(weight), bias)

    def _normalised_parameters(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``γ/σ(var) · W η/η_next`` and ``(β + γ(b - mean)/σ(var)) / η_next``; η counts with ``input_factor``.

        Mean and var (biased) are (out channels,); b is 0 without a bias. Neither result is rounded.
        """
        bn = self.bn
        scale = bn.weight * torch.rsqrt(var + bn.eps)
        eta_next = self.eta_next()
        ratio = self.input_factor * self.input_format.eta().to(self.weight.dtype) / eta_next
        shift = -mean if self.bias is None else self.bias - mean
        return self.weight * (scale * ratio).view(-1, 1, 1, 1), (bn.bias + scale * shift) / eta_next

    @classmethod
    def from_float(cls, mod: nn.Module) -> FixedPointConvBn2d:
        """Return the fixed-point form of a fused row Conv2d, BatchNorm2d(, ReLU): it shares parameters and BatchNorm.

        A ReLU becomes part of the rounding in the layer that reads the output. The input of the layer is unsigned
        (``signed_input=False``), and its bias has 32 bits in eval mode. The layer gets the mode of ``mod``, and so does
        the shared BatchNorm, even if it was in eval mode.

        Args:
            mod: a ``ConvBn2d`` or ``ConvBnReLU2d`` of `tritonq.nn.intrinsic`; its attribute ``qconfig`` makes the
                formats of input and weight. Without one, or if it is None, the preset ``"f8net"`` does.

        Raises:
            TypeError: another class, or a subclass.
            ValueError: groups, padding or a qconfig that the constructor refuses, or a BatchNorm without γ and β or
                without running statistics.
        """
        has_relu = type(mod) is intrinsic.ConvBnReLU2d
        check_float_type(cls, mod, intrinsic.ConvBnReLU2d if has_relu else intrinsic.ConvBn2d)
        conv, bn = cast(nn.Sequential, mod)[0], cast(nn.Sequential, mod)[1]
        layer = cls(**conv_arguments(cast(nn.Conv2d, conv)), qconfig=getattr(mod, "qconfig", None))
        if bn.weight is None:
            raise ValueError("a BatchNorm with affine=False can't be part of a fixed-point layer")
        layer.bn = checked_batch_norm(bn)
        return cast(FixedPointConvBn2d, _sharing(layer, conv).train(mod.training))


class FixedPointLinear(FixedPointLayer, nn.Linear):  # type: ignore[misc]
    """``y = xq FQ(W η/η_next)^T + b/η_next``: a linear layer in fixed point.

    xq is the rounded input, which holds values divided by the layer's scaling factor η. FQ rounds to fixed point, and
    η_next is the factor of the layer that reads the output; 1 if the network returns it.

    Args:
        *args: arguments of ``nn.Linear``.
        qconfig: two :class:`FixedPointFakeQuantize` factories; None: preset ``"f8net"``.
        signed_input: whether the input has negative values. If not, rounding it is the ReLU before this layer.
        bias_word_len: bits of the bias in eval, 2 to 32; None: a float bias, which can't be deployed.
        **kwargs: named arguments of ``nn.Linear``.

    Raises:
        ValueError: a qconfig that isn't fixed point, a weight format that is unsigned or per another axis than 0, or a
            bias of other than 2 to 32 bits.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.FixedPointLinear(3, 2, signed_input=True, qconfig=tritonq.get_qconfig("f8net"))
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        *args: Any,
        qconfig: QConfig | None = None,
        signed_input: bool = False,
        bias_word_len: int | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.attach_formats(qconfig, signed_input, bias_word_len)

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return ``input_factor · W η / η_next`` and ``b / η_next`` (None without bias), not rounded.

        The attribute ``input_factor`` is the constant that an average pooling before the layer leaves to it; else 1.
        """
        return self._unnormalised_parameters()

    @classmethod
    def from_float(cls, mod: nn.Module) -> FixedPointLinear:
        """Return the fixed-point form of ``mod``, whose parameters it shares and whose ``qconfig`` it uses.

        It has the mode of ``mod``, and the preset ``"f8net"`` if ``mod`` has no ``qconfig``. Its input is unsigned
        (``signed_input=False``), and its bias has 32 bits in eval mode.

        Raises:
            TypeError: not an ``nn.Linear``, or of a subclass of it.
            ValueError: a qconfig that isn't fixed point, or whose weight format is unsigned or per another axis than 0.
        """
        check_float_type(cls, mod, nn.Linear)
        linear = cast(nn.Linear, mod)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            qconfig=getattr(mod, "qconfig", None),
        )
        return cast(FixedPointLinear, _sharing(layer, mod).train(mod.training))


def _sharing(layer: FixedPointLayer, mod: nn.Module) -> FixedPointLayer:
    """Give ``layer`` the weight and bias of ``mod``, move its formats to their device, and return it."""
    layer.weight, layer.bias = cast(Tensor, mod.weight), cast("Tensor | None", mod.bias)
    layer.move_formats(layer.weight.device)
    return layer
