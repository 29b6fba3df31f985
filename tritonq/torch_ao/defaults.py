"""torch.ao's ready-made observers, fake quantizers and qconfigs."""

from __future__ import annotations

import torch
from torch import nn

from tritonq.factory import Factory
from tritonq.fake_quantize import FakeQuantize
from tritonq.nn import DEFAULT_QAT_MAPPING
from tritonq.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from tritonq.prepare.edit.eager import FIXED_OUTPUTS, fixed_quantizer
from tritonq.qconfig import TORCH_BACKENDS, QConfig, default_fake_quant

default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_weight_observer = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)
_NARROW = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}
weight_observer_range_neg_127_to_127 = default_weight_observer.with_args(**_NARROW)
per_channel_weight_observer_range_neg_127_to_127 = default_per_channel_weight_observer.with_args(**_NARROW)

# The arithmetic of torch's fused operator.
FusedMovingAvgObsFakeQuantize = FakeQuantize.with_args(rule="torch_v1")
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
)
default_fused_per_channel_wt_fake_quant = default_fused_wt_fake_quant.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0
)
fused_wt_fake_quant_range_neg_127_to_127 = default_fused_wt_fake_quant.with_args(**_NARROW)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = default_fused_per_channel_wt_fake_quant.with_args(**_NARROW)
default_histogram_fake_quant = default_fake_quant.with_args(observer=HistogramObserver)

default_qat_qconfig_v2 = QConfig(default_fused_act_fake_quant, default_fused_wt_fake_quant)
_SIGNED_ACTIVATION = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, eps=2**-12
)
default_symmetric_qnnpack_qat_qconfig = QConfig(_SIGNED_ACTIVATION, fused_wt_fake_quant_range_neg_127_to_127)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _SIGNED_ACTIVATION, fused_per_channel_wt_fake_quant_range_neg_127_to_127
)


def _rounding(observer: Factory[MinMaxObserver]) -> Factory[FakeQuantize]:
    """Return a factory of fake quantizers with this observer, since tritonq calibrates and trains the same model."""
    return FakeQuantize.with_args(observer=observer.make, **observer.arguments)


default_qconfig = QConfig(_rounding(default_observer), _rounding(default_weight_observer))
default_per_channel_qconfig = QConfig(_rounding(default_observer), _rounding(default_per_channel_weight_observer))


def _fixed(kind: type[nn.Module]) -> Factory[FakeQuantize]:
    scale, zero_point = FIXED_OUTPUTS[kind]
    return Factory(fixed_quantizer, {"scale": scale, "zero_point": zero_point})


default_fixed_qparams_range_0to1_fake_quant = default_affine_fixed_qparams_fake_quant = _fixed(nn.Sigmoid)
default_fixed_qparams_range_neg1to1_fake_quant = default_symmetric_fixed_qparams_fake_quant = _fixed(nn.Tanh)


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """Return torch.ao's preset for quantization after training: a histogram of activations, ranges of weights.

    tritonq's quantizers hold these observers, so that one model can be calibrated, trained, and converted.

    Args:
        backend: ``"fbgemm"`` or ``"x86"`` (activation codes 0 to 127), ``"qnnpack"`` or ``"onednn"`` (0 to 255).
            Weights have a scale per channel, but for ``"qnnpack"`` one per tensor.
        version: 0, the one that torch.ao has.

    Raises:
        ValueError: an unknown backend or version.

    Source: torch.ao.quantization.get_default_qconfig.

    Examples:
        >>> get_default_qconfig("qnnpack").activation().qtype.quant_max
        255
    """
    if version != 0:
        raise ValueError(f"version must be 0, got {version}")
    if backend not in TORCH_BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(TORCH_BACKENDS)}")
    reduce_range, per_channel = TORCH_BACKENDS[backend]
    activation = FakeQuantize.with_args(observer=HistogramObserver, reduce_range=reduce_range)
    weight = default_per_channel_weight_observer if per_channel else default_weight_observer
    return QConfig(activation, _rounding(weight), backend)


def get_default_qat_module_mappings() -> dict[type[nn.Module], type[nn.Module]]:
    """Return a copy of the mapping from float types to quantization-aware types that ``prepare_qat`` swaps by.

    Source: torch.ao.quantization.get_default_qat_module_mappings.

    Examples:
        >>> get_default_qat_module_mappings()[nn.Linear]
        <class 'tritonq.nn.linear.Linear'>
    """
    return dict(DEFAULT_QAT_MAPPING)
