"""Quantization-aware linear layers, with and without ReLU.

FQ_w and FQ_a are fake quantization by the child quantizers ``weight_fake_quant`` and ``activation_post_process``, which
``qconfig=`` makes and which observe in training.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

from torch import nn

from tritonq.nn import intrinsic
from tritonq.nn.conv import check_float_type, share_parameters, take_ceiling
from tritonq.nn.eval_mode import PATHS
from tritonq.nn.qat import QATLayer, without_qconfig
from tritonq.qconfig import QConfig


class Linear(QATLayer, nn.Linear):  # type: ignore[misc]
    """``y = FQ_a(relu?(x FQ_w(W)^T + b))``; the constructor is ``nn.Linear``'s, plus ``qconfig=``.

    FQ_w and FQ_a are fake quantization of weight and output; ``relu?`` is a ReLU in the classes that are named so.

    Args:
        *args: arguments of ``nn.Linear``.
        qconfig: makes the quantizers of weight and output.
        **kwargs: named arguments of ``nn.Linear``.

    Raises:
        TypeError: no QConfig, one given twice, or one whose factories or ``round_summands`` have a wrong type.
        ValueError: an unknown option in the QConfig; a per-channel weight quantizer with ``ch_axis`` other than 0; or
            groups of weights along another axis than 1, or of a size that does not divide ``in_features``.

    Source: torch.ao.nn.qat.Linear.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.Linear(3, 2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 2])
        >>> layer.weight_fake_quant.scale.shape
        torch.Size([2])
    """

    _expected_type: ClassVar[type[nn.Module]] = nn.Linear
    paths = PATHS

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig, self.out_features)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Linear:
        """Return a layer of this class with the parameters of ``mod``, not copies, its ``qconfig`` and training mode.

        Args:
            mod: the float layer, which has the attribute ``qconfig``: an ``nn.Linear``; for LinearReLU the fused row
                ``tritonq.nn.intrinsic.LinearReLU``. Subclasses are refused.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: ``mod`` is of another class, its row does not end in a ReLU, ReLU6 or ``Hardtanh(0, b)``, or it
                has no valid QConfig.
            ValueError: as the constructor.
        """
        # MultiheadAttention's output layer is a Linear by another name.
        renamed = nn.modules.linear.NonDynamicallyQuantizableLinear
        also_plain = type(mod) is renamed and cls._expected_type is nn.Linear
        check_float_type(cls, mod, renamed if also_plain else cls._expected_type)
        linear = cast(nn.Linear, mod[0] if isinstance(mod, intrinsic.FusedModule) else mod)
        qat = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            qconfig=getattr(mod, "qconfig", None),
        )
        share_parameters(qat, linear)
        take_ceiling(qat, mod)
        return qat.train(mod.training)


class LinearReLU(Linear):
    """``FQ_a(relu(x FQ_w(W)ᵀ + b))``, Linear and ReLU as one layer: arguments of ``nn.Linear``, plus ``qconfig=``.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.LinearReLU(3, 2, qconfig=tritonq.get_qconfig())
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 2])
    """

    _expected_type = intrinsic.LinearReLU
    ceiling = math.inf
