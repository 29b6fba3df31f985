"""Quantization-aware convolutions: ``y = FQ_a(relu?(conv(x, FQ_w(W)) + b))``, all tensors float.

FQ_w and FQ_a are fake quantization by the child quantizers ``weight_fake_quant`` and ``activation_post_process``, which
observe in training. ``relu?`` is a ReLU in classes with "ReLU" in their names, and nothing in others. Constructors take
the arguments of the float convolution of torch.nn, and ``qconfig=``, which makes both quantizers. In eval mode, if the
input lies on a known grid, sums are computed in exact integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tritonq.nn import intrinsic
from tritonq.nn.eval_mode import PATHS
from tritonq.nn.fusable import ceiling_of
from tritonq.nn.qat import QATLayer, without_qconfig
from tritonq.qconfig import QConfig


class QATConv(QATLayer, nn.modules.conv._ConvNd):
    """``y = FQ_a(relu?(conv(x, FQ_w(W)) + b))``: the base of the convolutions here.

    FQ_w and FQ_a are fake quantization of weight and output. ``relu?`` is a ReLU if :attr:`QATLayer.ceiling` is a
    number, its upper bound; nothing if that is None. A per-channel weight quantizer has one scale per out channel, in
    transposed convolutions, too.

    Args:
        *args: arguments of the float convolution; the qconfig may stand among them.
        qconfig: makes the quantizers of weight and output.
        **kwargs: named arguments of the float convolution.

    Raises:
        TypeError: no QConfig given, or two.
        ValueError: a per-channel weight quantizer with ``ch_axis`` other than 0; scales per group of weights along
            another axis than 1, or of a group size that does not divide ``in_channels / groups``; or what the float
            convolution refuses.

    Source: torch.ao.nn.qat.

    Examples:
        >>> import torch, tritonq
        >>> layer = Conv2d(1, 4, 3, qconfig=tritonq.get_qconfig("tensorrt"))
        >>> isinstance(layer, QATConv), layer(torch.randn(2, 1, 8, 8)).shape
        (True, torch.Size([2, 4, 6, 6]))
    """

    _float_type: ClassVar[type[nn.modules.conv._ConvNd]]
    _fused_type: ClassVar[type[intrinsic.FusedModule] | None] = None
    paths = PATHS

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig, self.out_channels)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> QATConv:
        """Return the layer of this class that replaces ``mod``, with quantizers of ``mod.qconfig``.

        It is in training or eval mode as ``mod`` is. Weight and bias are the same parameters, not copies.

        Args:
            mod: the float convolution; for a class with ReLU the row of both in `tritonq.nn.intrinsic`.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: ``mod`` is not exactly of the class that this one replaces, has no QConfig, or ends in an
                activation that is no ReLU.
            ValueError: a weight quantizer that the constructor refuses.
        """
        check_float_type(cls, mod, cls._fused_type or cls._float_type)
        conv = cast(nn.modules.conv._ConvNd, mod[0] if isinstance(mod, intrinsic.FusedModule) else mod)
        qat = cls(**conv_arguments(conv), qconfig=getattr(mod, "qconfig", None))
        share_parameters(qat, conv)
        take_ceiling(qat, mod)
        return qat.train(mod.training)


class Conv1d(QATConv, nn.Conv1d):
    """Quantization-aware ``nn.Conv1d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.Conv1d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 10)).shape
        torch.Size([8, 4, 8])
    """

    _float_type = nn.Conv1d


class Conv2d(QATConv, nn.Conv2d):
    """Quantization-aware ``nn.Conv2d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.Conv2d(2, 4, 3, padding=1, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 6, 6)).shape
        torch.Size([8, 4, 6, 6])
    """

    _float_type = nn.Conv2d


class Conv3d(QATConv, nn.Conv3d):
    """Quantization-aware ``nn.Conv3d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.Conv3d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 5, 5, 5)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    _float_type = nn.Conv3d


class ConvReLU1d(Conv1d):
    """Quantization-aware Conv1d and ReLU: arguments of ``nn.Conv1d``, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvReLU1d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 10)).shape
        torch.Size([8, 4, 8])
    """

    _fused_type = intrinsic.ConvReLU1d
    ceiling = math.inf


class ConvReLU2d(Conv2d):
    """Quantization-aware Conv2d and ReLU: arguments of ``nn.Conv2d``, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvReLU2d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> y = layer(torch.randn(8, 2, 6, 6))
        >>> y.shape, bool((y >= 0).all()), len(y.unique()) <= 256
        (torch.Size([8, 4, 4, 4]), True, True)
    """

    _fused_type = intrinsic.ConvReLU2d
    ceiling = math.inf


class ConvReLU3d(Conv3d):
    """Quantization-aware Conv3d and ReLU: arguments of ``nn.Conv3d``, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvReLU3d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 5, 5, 5)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    _fused_type = intrinsic.ConvReLU3d
    ceiling = math.inf


class TakesOutputSize(nn.Module):
    """Let a call of a transposed convolution give the result's size, as in torch: ``layer(x, output_size=[7, 7])``.

    The size, of the image's axes or of all, decides the output padding of this call alone. It is taken in ``__call__``,
    so that forwards, and what replaces them, do not get it. A size that no output padding gives is a ValueError.
    """

    output_padding: tuple[int, ...]

    def __call__(self, input: Tensor, *others: Any, output_size: Sequence[int] | None = None, **named: Any) -> Any:
        """Run the layer; ``output_size`` may be given by name or, as in torch, as the second positional argument."""
        if others and not isinstance(others[0], (Tensor, type(None))):
            output_size, *others = others  # type: ignore[assignment]
        padding = self.output_padding if output_size is None else self._padding_for(input, output_size)
        layer = self if padding == self.output_padding else self._padded(padding)
        return nn.Module.__call__(layer, input, *others, **named)

    def _padding_for(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding, one number per axis, that gives the result the size ``output_size``.

        ``output_size`` has a number per axis of the image, or all axes of the result, as in torch.

        Raises:
            ValueError: no output padding does.
        """
        conv = cast(Any, self)
        sizes = conv.stride, conv.padding, conv.kernel_size, len(conv.kernel_size), conv.dilation
        return tuple(conv._output_padding(input, list(output_size), *sizes))

    def _padded(self, padding: tuple[int, ...]) -> TakesOutputSize:
        """Return a copy with another output padding (a number per axis) that shares parameters and children.

        The layer itself does not change, so that threads do not see each other's padding.

        Raises:
            ValueError: the layer is being exported, with one padding.
        """
        if "forward" in vars(self):
            raise ValueError(
                f"a transposed convolution is exported with output padding {self.output_padding} and is called with an "
                f"output_size that needs {padding}: a file holds one size of its result"
            )
        layer = type(self).__new__(type(self))
        layer.__dict__.update(vars(self), output_padding=padding)
        return layer


class ConvTranspose2d(TakesOutputSize, QATConv, nn.ConvTranspose2d):  # type: ignore[misc]
    """Quantization-aware ``nn.ConvTranspose2d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTranspose2d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3, 3)).shape
        torch.Size([8, 4, 6, 6])
    """

    _float_type = nn.ConvTranspose2d


class ConvTransposeReLU2d(ConvTranspose2d):
    """Quantization-aware ConvTranspose2d and ReLU: the former's arguments and ``qconfig=``; formulas in `QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeReLU2d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3, 3)).shape
        torch.Size([8, 4, 6, 6])
    """

    _fused_type = intrinsic.ConvTransposeReLU2d
    ceiling = math.inf


class ConvTranspose1d(TakesOutputSize, QATConv, nn.ConvTranspose1d):  # type: ignore[misc]
    """Quantization-aware ``nn.ConvTranspose1d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTranspose1d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3)).shape
        torch.Size([8, 4, 6])
    """

    _float_type = nn.ConvTranspose1d


class ConvTransposeReLU1d(ConvTranspose1d):
    """Quantization-aware ConvTranspose1d and ReLU: the former's arguments and ``qconfig=``; formulas in `QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeReLU1d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3)).shape
        torch.Size([8, 4, 6])
    """

    _fused_type = intrinsic.ConvTransposeReLU1d
    ceiling = math.inf


class ConvTranspose3d(TakesOutputSize, QATConv, nn.ConvTranspose3d):  # type: ignore[misc]
    """Quantization-aware ``nn.ConvTranspose3d``: its arguments, plus ``qconfig=``; formulas in :class:`QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTranspose3d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    _float_type = nn.ConvTranspose3d


class ConvTransposeReLU3d(ConvTranspose3d):
    """Quantization-aware ConvTranspose3d and ReLU: the former's arguments and ``qconfig=``; formulas in `QATConv`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeReLU3d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    _fused_type = intrinsic.ConvTransposeReLU3d
    ceiling = math.inf


def check_float_type(cls: type[nn.Module], mod: nn.Module, expected: type[nn.Module]) -> None:
    """Raise TypeError unless the type of ``mod`` is exactly ``expected``; ``cls`` is named in the message."""
    if type(mod) is not expected:
        raise TypeError(f"{cls.__name__}.from_float expects {expected.__name__}, got {type(mod).__name__}")


def conv_arguments(conv: nn.modules.conv._ConvNd) -> dict[str, Any]:
    """Return constructor arguments by name for a convolution like ``conv``, on the device "meta" (no memory is used).

    They are the channels, ``kernel_size``, ``stride``, ``padding``, ``dilation``, ``groups``, ``padding_mode``,
    ``bias`` (a bool), ``device``, and ``output_padding`` of a transposed one.
    """
    arguments = {
        name: getattr(conv, name)
        for name in (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
            "padding_mode",
        )
    }
    if conv.transposed:
        arguments["output_padding"] = conv.output_padding
    return {**arguments, "bias": conv.bias is not None, "device": "meta"}


def take_ceiling(qat: QATLayer, row: nn.Module) -> None:
    """Set ``qat.ceiling`` to the upper bound of the activation at the end of the float ``row``, in place.

    A plain ReLU has infinity. Nothing happens if the class of ``qat`` has no ReLU (its ceiling is None).

    Raises:
        TypeError: the row ends in something that is no ReLU, ReLU6 or ``Hardtanh(0, b)`` with b > 0.
    """
    if qat.ceiling is None:
        return
    activation = cast(nn.Sequential, row)[-1]
    qat.ceiling = ceiling_of(activation)
    if qat.ceiling is None:
        raise TypeError(f"{type(qat).__name__} takes a ReLU, ReLU6 or Hardtanh(0, b), got {activation}")


def share_parameters(qat: QATLayer, source: nn.Module) -> None:
    """Give ``qat``, built on the meta device, the weight and bias of ``source``: the same parameters, not copies.

    Where that bias is None, ``qat.bias`` stays as it is. The quantizers of weight and output move to the device of
    ``source.weight``.
    """
    for name in ("weight", "bias"):
        parameter = getattr(source, name)
        if parameter is not None:
            setattr(qat, name, parameter)
    qat.move_quantizers(cast(Tensor, source.weight).device)
