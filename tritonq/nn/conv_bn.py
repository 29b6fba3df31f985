"""Quantization-aware convolution + BatchNorm, with and without ReLU, and the same for linear layers."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.nn import intrinsic
from tritonq.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose2d, check_float_type, conv_arguments, share_parameters
from tritonq.nn.linear import Linear
from tritonq.nn.qat import QATLayer
from tritonq.qconfig import QConfig
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels


class QATBatchNormLayer(QATLayer):
    """A convolution or linear layer whose BatchNorm is part of it: the approximate mode of folding.

    Training: ``y = BN(op(x, FQ_w(W s)) / s + b)`` with ``s = γ/σ(running_var)`` from before this step's update, and
    ``s = 1/σ`` in a channel where γ = 0, so that nothing is divided by zero and γ can leave zero. Eval and frozen:
    ``y = op(x, FQ_w(W t)) + β + t (b - running_mean)`` with ``t = γ/σ(running_var)``.

    The BatchNorm lives in the child ``bn``. Source: torch.ao.nn.intrinsic.qat; SEMANTICS section 4.
    """

    bn: nn.modules.batchnorm._BatchNorm
    freeze_bn: bool = False
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
        y = self._approximate(x) if self.training and not self.freeze_bn else self.affine(x, *self.folded_parameters())
        return cast(Tensor, self.activation_post_process(F.relu(y) if self._relu else y))

    def _approximate(self, x: Tensor) -> Tensor:
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

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> LinearBn1d:
        """The quantization-aware form of the fused row ``mod``; errors as for the convolutions."""
        check_float_type(cls, mod, cls._expected_type)
        bn = cast(nn.Sequential, mod)[1]
        qat = cast(LinearBn1d, super().from_float(mod))
        qat.bn = checked_batch_norm(bn)
        return cast(LinearBn1d, qat.train(mod.training))


def checked_batch_norm(bn: nn.Module) -> nn.modules.batchnorm._BatchNorm:
    """``bn`` if it is a BatchNorm with running statistics, else ValueError."""
    if getattr(bn, "running_var", None) is None:
        raise ValueError("a BatchNorm with track_running_stats=False has no statistics to fold into a convolution")
    return cast(nn.modules.batchnorm._BatchNorm, bn)
