"""Quantization-aware convolution + BatchNorm, with and without ReLU, and the same for linear layers."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.functional.conv_bn import ConvBnStep, conv_bn
from tritonq.functional.linear_map import LinearMap, MatrixProduct, pad_input
from tritonq.nn import intrinsic
from tritonq.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose2d, check_float_type, conv_arguments, share_parameters
from tritonq.nn.fusable import has_hooks, input_grid, range_state, warn_if_unobserved
from tritonq.nn.linear import Linear
from tritonq.nn.qat import QATLayer
from tritonq.qconfig import QConfig
from tritonq.reference.conv_bn import BatchNormState
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels
from tritonq.reference.quantizer_state import QuantizerState


class QATBatchNormLayer(QATLayer):
    """A convolution or linear layer whose BatchNorm is part of it: the approximate mode of folding.

    Training: ``y = BN(op(x, FQ_w(W s)) / s + b)`` with ``s = γ/σ(running_var)`` from before this step's update, and
    ``s = 1/σ`` in a channel where γ = 0, so that nothing is divided by zero and γ can leave zero. Eval and frozen:
    ``y = op(x, FQ_w(W t)) + β + t (b - running_mean)`` with ``t = γ/σ(running_var)``.

    The BatchNorm lives in the child ``bn``. Source: torch.ao.nn.intrinsic.qat; SEMANTICS section 4.
    """

    bn: nn.modules.batchnorm._BatchNorm
    freeze_bn: bool = False
    # Keep the input for the backward as 8-bit codes where it lies on the grid of a known quantizer.
    save_input_codes: bool = True
    _bn_type: ClassVar[type[nn.modules.batchnorm._BatchNorm]]
    _relu: ClassVar[bool]
    _grouping: tuple[bool, int] = (False, 1)

    def attach_batch_norm(self, features: int, eps: float, momentum: float | None, freeze_bn: bool) -> None:
        """Create the child ``bn``; ``freeze_bn`` starts with frozen statistics."""
        self.bn = self._bn_type(features, eps=eps, momentum=momentum)
        self.freeze_bn = freeze_bn

    def folded_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the running statistics folded in."""
        scale = fold_scale(self._running_var(), self.bn.weight, self.bn.eps)
        bias = fold_bias(self.bias, cast(Tensor, self.bn.running_mean), scale, self.bn.bias)
        return scale_out_channels(self.weight, scale, *self._grouping), bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer, its BatchNorm, ReLU where there is one, and fake quantization."""
        if not self._normalises_with_batch():
            return self._quantized_output(self.affine(x, *self.folded_parameters()))
        weight_quantizer = range_state(self.weight_fake_quant)
        plain_weight = isinstance(self.weight_fake_quant, nn.Identity)
        if (weight_quantizer is None and not plain_weight) or not _is_plain(self.bn):
            return self._quantized_output(self._approximate(x))
        return self._fused(x, weight_quantizer)

    def _normalises_with_batch(self) -> bool:
        return self.training and self.bn.training and not self.freeze_bn

    def _quantized_output(self, y: Tensor) -> Tensor:
        return cast(Tensor, self.activation_post_process(F.relu(y) if self._relu else y))

    def as_linear_map(self, x: Tensor) -> tuple[Tensor, LinearMap]:
        """The input, padded where the map itself cannot, and the layer without weight and bias.

        Raises:
            ValueError: an input of the wrong number of dimensions.
        """
        raise NotImplementedError

    def _fused(self, x: Tensor, weight_quantizer: QuantizerState | None) -> Tensor:
        """The approximate mode as one operator, with the activation quantizer in it where that is possible."""
        x, op = self.as_linear_map(x)
        output_quantizer = range_state(self.activation_post_process)
        if output_quantizer is not None and output_quantizer.qtype.axis is not None:
            output_quantizer = None
        step = ConvBnStep(
            op,
            batch_norm_state(self.bn),
            weight_quantizer,
            output_quantizer,
            input_grid(self.input_quantizer) if self.save_input_codes else None,
            self._relu,
        )
        y = conv_bn(x, self.weight, self.bias, self.bn.weight, self.bn.bias, step)
        if output_quantizer is None:
            return cast(Tensor, self.activation_post_process(y))
        warn_if_unobserved(self.activation_post_process)
        return y

    def _approximate(self, x: Tensor) -> Tensor:
        """The same from its parts, for quantizers that no operator can take over."""
        scale = fold_scale(self._running_var(), self.bn.weight, self.bn.eps)
        if self.bn.weight is not None:
            # In a channel with γ = 0 the weight is quantized as if γ were 1; BatchNorm still multiplies by 0.
            scale = torch.where(self.bn.weight == 0, torch.rsqrt(self._running_var() + self.bn.eps), scale)
        weight = self.quantized_weight(scale_out_channels(self.weight, scale, *self._grouping))
        y = self.linear_op(x, weight)
        shape = [1] * y.dim()
        shape[self._output_axis] = -1
        y = y / scale.view(shape)
        return cast(Tensor, self.bn(y if self.bias is None else y + self.bias.view(shape)))

    def _running_var(self) -> Tensor:
        return cast(Tensor, self.bn.running_var)

    def freeze_bn_stats(self) -> QATBatchNormLayer:
        """Stop updating the running statistics and normalise with them, in training too."""
        self.freeze_bn = True
        self.bn.training = False
        return self

    def update_bn_stats(self) -> QATBatchNormLayer:
        """Undo :meth:`freeze_bn_stats`."""
        self.freeze_bn = False
        self.bn.training = self.training
        return self

    def reset_running_stats(self) -> None:
        """Reset the BatchNorm's running statistics."""
        self.bn.reset_running_stats()

    def train(self, mode: bool = True) -> QATBatchNormLayer:
        """Switch mode; a frozen BatchNorm stays in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            self.bn.training = False
        return self


class _ConvBn(QATBatchNormLayer):
    """Constructor and `from_float` of the convolutions below."""

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: QConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, qconfig=qconfig, **kwargs)
        conv = cast(nn.modules.conv._ConvNd, self)
        self._grouping = (conv.transposed, conv.groups)
        self.attach_batch_norm(conv.out_channels, eps, momentum, freeze_bn)

    def as_linear_map(self, x: Tensor) -> tuple[Tensor, LinearMap]:
        """See base class."""
        conv = cast(nn.modules.conv._ConvNd, self)
        if x.dim() != len(conv.kernel_size) + 2:
            raise ValueError(f"expected an input of {len(conv.kernel_size) + 2} dimensions, got {tuple(x.shape)}")
        return pad_input(conv, x)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> _ConvBn:
        """The quantization-aware form of the fused row ``mod``: it shares convolution parameters and BatchNorm.

        Raises:
            TypeError: not the row that this class replaces, or no QConfig on it.
            ValueError: a BatchNorm without running statistics.
        """
        check_float_type(cls, mod, cast(Any, cls)._fused_type)
        conv, bn = cast(nn.Sequential, mod)[0], cast(nn.Sequential, mod)[1]
        qat = cls(**conv_arguments(cast(nn.modules.conv._ConvNd, conv)), qconfig=getattr(mod, "qconfig", None))
        qat.bn = checked_batch_norm(bn)
        share_parameters(qat, conv)
        return cast(_ConvBn, qat.train(mod.training))


class ConvBn1d(_ConvBn, Conv1d):  # type: ignore[misc]
    """Quantization-aware Conv1d and BatchNorm1d; see :class:`QATBatchNormLayer`."""

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn1d
    _bn_type = nn.BatchNorm1d


class ConvBn2d(_ConvBn, Conv2d):  # type: ignore[misc]
    """Quantization-aware Conv2d and BatchNorm2d; see :class:`QATBatchNormLayer`."""

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn2d
    _bn_type = nn.BatchNorm2d


class ConvBn3d(_ConvBn, Conv3d):  # type: ignore[misc]
    """Quantization-aware Conv3d and BatchNorm3d; see :class:`QATBatchNormLayer`."""

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn3d
    _bn_type = nn.BatchNorm3d


class ConvBnReLU1d(ConvBn1d):
    """Quantization-aware Conv1d, BatchNorm1d and ReLU; see :class:`QATBatchNormLayer`."""

    _fused_type = intrinsic.ConvBnReLU1d
    _relu = True


class ConvBnReLU2d(ConvBn2d):
    """Quantization-aware Conv2d, BatchNorm2d and ReLU; see :class:`QATBatchNormLayer`."""

    _fused_type = intrinsic.ConvBnReLU2d
    _relu = True


class ConvBnReLU3d(ConvBn3d):
    """Quantization-aware Conv3d, BatchNorm3d and ReLU; see :class:`QATBatchNormLayer`."""

    _fused_type = intrinsic.ConvBnReLU3d
    _relu = True


class ConvTransposeBn2d(_ConvBn, ConvTranspose2d):  # type: ignore[misc]
    """Quantization-aware ConvTranspose2d and BatchNorm2d; see :class:`QATBatchNormLayer`."""

    _fused_type = intrinsic.ConvTransposeBn2d
    _bn_type = nn.BatchNorm2d


class LinearBn1d(QATBatchNormLayer, Linear):  # type: ignore[misc]
    """Quantization-aware Linear and BatchNorm1d; see :class:`QATBatchNormLayer`."""

    _expected_type = intrinsic.LinearBn1d
    _bn_type = nn.BatchNorm1d
    # BatchNorm1d normalises axis 1, which is the feature axis of the 2-d input that it is used with.
    _output_axis = 1

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: QConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, qconfig=qconfig, **kwargs)
        self.attach_batch_norm(self.out_features, eps, momentum, freeze_bn)

    def as_linear_map(self, x: Tensor) -> tuple[Tensor, LinearMap]:
        """See base class."""
        if x.dim() != 2:
            raise ValueError(f"expected an input of shape (batch, features), got {tuple(x.shape)}")
        return x, MatrixProduct()

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> LinearBn1d:
        """The quantization-aware form of the fused row ``mod``; errors as for the convolutions."""
        check_float_type(cls, mod, cls._expected_type)
        bn = cast(nn.Sequential, mod)[1]
        qat = cast(LinearBn1d, super().from_float(mod))
        qat.bn = checked_batch_norm(bn)
        return cast(LinearBn1d, qat.train(mod.training))


def batch_norm_state(bn: nn.modules.batchnorm._BatchNorm) -> BatchNormState:
    """Buffers and constants of ``bn`` for a training step, which is counted."""
    running_mean, running_var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    momentum: float | Tensor | None = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = cast(Tensor, bn.num_batches_tracked).double().reciprocal()
    return BatchNormState(running_mean, running_var, momentum, bn.eps)


def _is_plain(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether ``bn`` computes what its buffers say, on this rank alone."""
    return type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not has_hooks(bn)


def checked_batch_norm(bn: nn.Module) -> nn.modules.batchnorm._BatchNorm:
    """``bn`` if it is a BatchNorm with running statistics, else ValueError."""
    if getattr(bn, "running_var", None) is None:
        raise ValueError("a BatchNorm with track_running_stats=False has no statistics to fold into a convolution")
    return cast(nn.modules.batchnorm._BatchNorm, bn)
