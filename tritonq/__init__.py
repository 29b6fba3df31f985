"""tritonq: quantization-aware training at the speed of float training, deployed to the numbers it was trained with."""

from tritonq import nn
from tritonq.backend import use_backend
from tritonq.fake_quantize import FakeQuantize
from tritonq.functional import (
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    fold_conv_bn,
    fuse_conv_bn,
)
from tritonq.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PassiveObserver,
    PerChannelMinMaxObserver,
)
from tritonq.qconfig import (
    QConfig,
    default_embedding_qat_qconfig,
    default_qat_qconfig,
    get_default_qat_qconfig,
    get_qconfig,
)
from tritonq.qparams import QuantizedType, range_to_qparams

__all__ = [
    "FakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PassiveObserver",
    "PerChannelMinMaxObserver",
    "QConfig",
    "QuantizedType",
    "default_embedding_qat_qconfig",
    "default_qat_qconfig",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fold_conv_bn",
    "fuse_conv_bn",
    "get_default_qat_qconfig",
    "get_qconfig",
    "nn",
    "range_to_qparams",
    "use_backend",
]
