"""Quantization-aware convolution + BatchNorm, with and without ReLU, and the same for linear layers.

``op`` is the convolution or product with weight W and bias b, t is ``γ/σ``, and FQ is fake quantization. In eval mode
each class computes ``FQ_a(relu?(op(x, FQ_w(W t)) + FQ_b(β + t (b - mean))))`` with the running statistics. In training
``mode`` says how the BatchNorm is folded: "approximate", "exact", "corrected" or "scale"; :class:`QATBatchNormLayer`
has formulas. Without FQ all are ``relu?(BN(op(x, W) + b))``. Constructors take the float layer's arguments, eps=1e-5,
momentum=0.1, freeze_bn=False, qconfig (required) and, by name only, mode=None: the qconfig's, or else "approximate".
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tritonq.nn import intrinsic
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    QATConv,
    check_float_type,
    conv_arguments,
    share_parameters,
    take_ceiling,
)
from tritonq.nn.folding_modes import PATHS
from tritonq.nn.linear import Linear
from tritonq.nn.paths import Mode
from tritonq.nn.qat import without_qconfig
from tritonq.qconfig import QConfig

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _ConvBn(QATBatchNormLayer):
    """The constructor and `from_float` of the convolutions with BatchNorm; a QConfig may stand at any position.

    The convolution has no bias by default; a transposed one, which torch.ao lacks, has one.
    """

    paths = PATHS

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: QConfig | None = None,
        mode: Mode | None = None,
        **kwargs: Any,
    ) -> None:
        float_type = cast(QATConv, self)._float_type
        args, qconfig = without_qconfig(args, qconfig)
        args, (eps, momentum, freeze_bn) = _split_arguments(args, float_type, (eps, momentum, freeze_bn))
        if len(args) <= _names_of(float_type).index("bias") and not issubclass(float_type, _TRANSPOSED):
            kwargs.setdefault("bias", False)
        super().__init__(*args, qconfig=qconfig, **kwargs)
        conv = cast(nn.modules.conv._ConvNd, self)
        self.grouping = (conv.transposed, conv.groups)
        self.attach_batch_norm(conv.out_channels, eps, momentum, freeze_bn, mode)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> _ConvBn:
        """Return a new layer for the row ``mod``, in its mode (training or eval); parameters and BatchNorm are shared.

        Args:
            mod: the row of `tritonq.nn.intrinsic` with this class's name: convolution and BatchNorm, with ReLU for
                classes that have one. Its attribute ``qconfig`` makes the quantizers and chooses the folding.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: not the row that this class replaces, or no QConfig on it.
            ValueError: a BatchNorm without running statistics, or folding "scale" for a weight with zero points.
        """
        check_float_type(cls, mod, cast(Any, cls)._fused_type)
        conv, bn = cast(nn.Sequential, mod)[0], cast(nn.Sequential, mod)[1]
        qat = cls(**conv_arguments(cast(nn.modules.conv._ConvNd, conv)), qconfig=getattr(mod, "qconfig", None))
        qat.bn = checked_batch_norm(bn)
        share_parameters(qat, conv)
        take_ceiling(qat, mod)
        return cast(_ConvBn, qat.train(mod.training))


class ConvBn1d(_ConvBn, Conv1d):  # type: ignore[misc]
    """Quantization-aware Conv1d and BatchNorm1d as one layer.

    The constructor is that of ``nn.Conv1d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn1d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 10)).shape
        torch.Size([8, 4, 8])
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn1d
    _bn_type = nn.BatchNorm1d


class ConvBn2d(_ConvBn, Conv2d):  # type: ignore[misc]
    """Quantization-aware Conv2d and BatchNorm2d as one layer.

    The constructor is that of ``nn.Conv2d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(2, 4, 3, mode="exact", qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 6, 6)).shape
        torch.Size([8, 4, 4, 4])
        >>> layer.bn.num_features, layer.mode
        (4, 'exact')
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn2d
    _bn_type = nn.BatchNorm2d


class ConvBn3d(_ConvBn, Conv3d):  # type: ignore[misc]
    """Quantization-aware Conv3d and BatchNorm3d as one layer.

    The constructor is that of ``nn.Conv3d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn3d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 5, 5, 5)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvBn3d
    _bn_type = nn.BatchNorm3d


class ConvBnReLU1d(ConvBn1d):
    """Quantization-aware Conv1d, BatchNorm1d and ReLU as one layer.

    The constructor is that of ``nn.Conv1d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBnReLU1d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 10)).shape
        torch.Size([8, 4, 8])
    """

    _fused_type = intrinsic.ConvBnReLU1d
    ceiling = math.inf


class ConvBnReLU2d(ConvBn2d):
    """Quantization-aware Conv2d, BatchNorm2d and ReLU as one layer.

    The constructor is that of ``nn.Conv2d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBnReLU2d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 6, 6)).shape
        torch.Size([8, 4, 4, 4])
    """

    _fused_type = intrinsic.ConvBnReLU2d
    ceiling = math.inf


class ConvBnReLU3d(ConvBn3d):
    """Quantization-aware Conv3d, BatchNorm3d and ReLU as one layer.

    The constructor is that of ``nn.Conv3d``, with ``bias=False`` by default, plus eps, momentum, freeze_bn, qconfig and
    mode; :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBnReLU3d(2, 4, 3, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 5, 5, 5)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    _fused_type = intrinsic.ConvBnReLU3d
    ceiling = math.inf


class ConvTransposeBn2d(_ConvBn, ConvTranspose2d):  # type: ignore[misc]
    """Quantization-aware ConvTranspose2d and BatchNorm2d as one layer.

    The constructor is that of ``nn.ConvTranspose2d``, plus eps, momentum, freeze_bn, qconfig and mode;
    :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBn2d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3, 3)).shape
        torch.Size([8, 4, 6, 6])
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvTransposeBn2d
    _bn_type = nn.BatchNorm2d


class ConvTransposeBnReLU2d(ConvTransposeBn2d):
    """Quantization-aware ConvTranspose2d, BatchNorm2d and ReLU as one layer.

    The constructor is that of ``nn.ConvTranspose2d``, plus eps, momentum, freeze_bn, qconfig and mode;
    :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBnReLU2d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3, 3)).shape
        torch.Size([8, 4, 6, 6])
    """

    _fused_type = intrinsic.ConvTransposeBnReLU2d
    ceiling = math.inf


class ConvTransposeBn1d(_ConvBn, ConvTranspose1d):  # type: ignore[misc]
    """Quantization-aware ConvTranspose1d and BatchNorm1d: arguments and formulas as in :class:`ConvTransposeBn2d`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBn1d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3)).shape
        torch.Size([8, 4, 6])
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvTransposeBn1d
    _bn_type = nn.BatchNorm1d


class ConvTransposeBnReLU1d(ConvTransposeBn1d):
    """Quantization-aware ConvTranspose1d, BatchNorm1d and ReLU: arguments, formulas as in `ConvTransposeBnReLU2d`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBnReLU1d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 2, 3)).shape
        torch.Size([8, 4, 6])
    """

    _fused_type = intrinsic.ConvTransposeBnReLU1d
    ceiling = math.inf


class ConvTransposeBn3d(_ConvBn, ConvTranspose3d):  # type: ignore[misc]
    """Quantization-aware ConvTranspose3d and BatchNorm3d: arguments and formulas as in :class:`ConvTransposeBn2d`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBn3d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    _fused_type: ClassVar[type[intrinsic.FusedModule]] = intrinsic.ConvTransposeBn3d
    _bn_type = nn.BatchNorm3d


class ConvTransposeBnReLU3d(ConvTransposeBn3d):
    """Quantization-aware ConvTranspose3d, BatchNorm3d and ReLU: arguments, formulas as in `ConvTransposeBnReLU2d`.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvTransposeBnReLU3d(2, 4, 2, stride=2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    _fused_type = intrinsic.ConvTransposeBnReLU3d
    ceiling = math.inf


class LinearBn1d(QATBatchNormLayer, Linear):  # type: ignore[misc]
    """Quantization-aware Linear and BatchNorm1d as one layer; formulas in :class:`QATBatchNormLayer`.

    Args:
        *args: arguments of ``nn.Linear``, which eps, momentum and freeze_bn may follow.
        eps: of the BatchNorm.
        momentum: of the BatchNorm; None: running statistics are plain averages.
        freeze_bn: whether training, too, normalises with the running statistics and does not update them.
        qconfig: makes the quantizers of weight and output; required, and may stand among ``args``.
        mode: how training folds the BatchNorm; None: ``qconfig.folding``, or "approximate" if that is None.
        **kwargs: named arguments of ``nn.Linear``.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.LinearBn1d(3, 2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 2])
    """

    _expected_type: ClassVar[type[nn.Module]] = intrinsic.LinearBn1d
    _bn_type = nn.BatchNorm1d
    paths = PATHS

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: QConfig | None = None,
        mode: Mode | None = None,
        **kwargs: Any,
    ) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        args, (eps, momentum, freeze_bn) = _split_arguments(args, nn.Linear, (eps, momentum, freeze_bn))
        super().__init__(*args, qconfig=qconfig, **kwargs)
        self.attach_batch_norm(self.out_features, eps, momentum, freeze_bn, mode)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has two axes, (batch, features); their sizes are not checked."""
        if x.dim() != 2:
            raise ValueError(f"expected an input of shape (batch, features), got {tuple(x.shape)}")

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> LinearBn1d:
        """Return a new layer for the row ``mod``, in its mode (training or eval); parameters and BatchNorm are shared.

        Args:
            mod: the row of `tritonq.nn.intrinsic` with this class's name: linear layer and BatchNorm, with ReLU for the
                class that has one. Its attribute ``qconfig`` makes the quantizers and chooses the folding.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: not the row that this class replaces, or no QConfig on it.
            ValueError: a BatchNorm without running statistics, or folding "scale" for a weight with zero points.
        """
        check_float_type(cls, mod, cls._expected_type)
        bn = cast(nn.Sequential, mod)[1]
        qat = cast(LinearBn1d, super().from_float(mod))
        qat.bn = checked_batch_norm(bn)
        return cast(LinearBn1d, qat.train(mod.training))


class LinearBnReLU1d(LinearBn1d):
    """Quantization-aware Linear, BatchNorm1d and ReLU as one layer.

    The constructor is that of ``nn.Linear``, plus eps, momentum, freeze_bn, qconfig and mode;
    :class:`QATBatchNormLayer` has the formulas.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.LinearBnReLU1d(3, 2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 2])
    """

    _expected_type = intrinsic.LinearBnReLU1d
    ceiling = math.inf


def checked_batch_norm(bn: nn.Module) -> nn.modules.batchnorm._BatchNorm:
    """Return ``bn`` itself, typed as a BatchNorm; callers must have checked its class.

    Raises:
        ValueError: ``bn`` keeps no running statistics (``track_running_stats=False``).
    """
    if getattr(bn, "running_var", None) is None:
        raise ValueError("a BatchNorm with track_running_stats=False has no statistics to fold into a convolution")
    return cast(nn.modules.batchnorm._BatchNorm, bn)


def _names_of(kind: type[nn.Module]) -> list[str]:
    """Return the names of the positional arguments of a float layer's constructor, without device and dtype."""
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return [name for name in names if name not in ("device", "dtype")]


def _split_arguments(
    args: tuple[Any, ...], kind: type[nn.Module], defaults: tuple[float, float | None, bool]
) -> tuple[tuple[Any, ...], tuple[float, float | None, bool]]:
    """Return positional arguments as two tuples: the float layer's, and ``(eps, momentum, freeze_bn)``, which follow.

    Args:
        args: the positional arguments.
        kind: the float layer's class.
        defaults: eps, momentum and freeze_bn, for those that are not given.

    Raises:
        TypeError: more arguments than these.
    """
    count = len(_names_of(kind))
    given = args[count:]
    if len(given) > len(defaults):
        raise TypeError(f"expected at most {count + len(defaults)} positional arguments and qconfig, got {len(args)}")
    return args[:count], (*given, *defaults[len(given) :])
