"""tritonq: quantization-aware training at the speed of float training, deployed to the numbers it was trained with."""

from tritonq import acceleration, nn, testing
from tritonq.acceleration import accelerate, restore
from tritonq.accuracy.adaptive_rounding import adaptive_round
from tritonq.accuracy.bias_correction import correct_bias
from tritonq.accuracy.bit_allocation import allocate_bits
from tritonq.accuracy.distillation import Distillation
from tritonq.accuracy.equalization import equalize
from tritonq.accuracy.history import QuantizerHistory, QuantizerRecord
from tritonq.accuracy.oscillation import OscillationFreezing, oscillation_dampening
from tritonq.accuracy.reestimation import reestimate_batch_norm
from tritonq.backend import use_backend
from tritonq.calibration import calibrate, refine_scales
from tritonq.deploy import convert, export_onnx, export_program, load_converted, save_converted, verify
from tritonq.deploy.torch_ao import load_torch_ao_state_dict
from tritonq.distributed import broadcast_statistics, sync_observers
from tritonq.fake_quantize import FakeQuantize
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize, set_fixed_point_phase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.functional import (
    clipped_quantize,
    fake_quantize_float,
    fake_quantize_learnable,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    fixed_point_quantize,
    fold_conv_bn,
    fuse_conv_bn,
    histogram,
    quantize_bias,
    search_frac_len,
    statistic_frac_len,
    trained_threshold_quantize,
)
from tritonq.graphs import graphed
from tritonq.learned_fake_quantize import (
    ClippedFakeQuantize,
    LearnedStepFakeQuantize,
    TrainedThresholdFakeQuantize,
)
from tritonq.nn import DeQuantStub, QuantStub
from tritonq.nn.weights_together import quantize_weights_together
from tritonq.observers import (
    HistogramObserver,
    InterpolatingHistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PassiveObserver,
    PerChannelMinMaxObserver,
)
from tritonq.parameter_groups import parameter_groups
from tritonq.prepare import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    fuse_modules_qat,
    prepare_qat,
    update_bn_stats,
)
from tritonq.preset_mappings import get_qconfig_mapping, get_yolo_qconfig_mapping
from tritonq.qconfig import (
    QConfig,
    default_embedding_qat_qconfig,
    default_qat_qconfig,
    get_default_qat_qconfig,
    get_qconfig,
)
from tritonq.qconfig_files import load_qconfig_mapping, save_qconfig_mapping
from tritonq.qconfig_mapping import QConfigMapping
from tritonq.qparams import QuantizedType, range_to_qparams
from tritonq.recipes import TrainingRecipe, recipe_for
from tritonq.report.summary import summary
from tritonq.torch_operators import use_in_torch
from tritonq.version import __version__

__all__ = [
    "ClippedFakeQuantize",
    "DeQuantStub",
    "Distillation",
    "FakeQuantize",
    "FixedPointFakeQuantize",
    "FloatFakeQuantize",
    "HistogramObserver",
    "InterpolatingHistogramObserver",
    "LearnedStepFakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "OscillationFreezing",
    "PassiveObserver",
    "PerChannelMinMaxObserver",
    "QConfig",
    "QConfigMapping",
    "QuantStub",
    "QuantizedType",
    "QuantizerHistory",
    "QuantizerRecord",
    "TrainedThresholdFakeQuantize",
    "TrainingRecipe",
    "__version__",
    "accelerate",
    "acceleration",
    "adaptive_round",
    "allocate_bits",
    "broadcast_statistics",
    "calibrate",
    "clipped_quantize",
    "convert",
    "correct_bias",
    "default_embedding_qat_qconfig",
    "default_qat_qconfig",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "equalize",
    "export_onnx",
    "export_program",
    "fake_quantize_float",
    "fake_quantize_learnable",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fixed_point_quantize",
    "fold_conv_bn",
    "freeze_bn_stats",
    "fuse_conv_bn",
    "fuse_modules_qat",
    "get_default_qat_qconfig",
    "get_qconfig",
    "get_qconfig_mapping",
    "get_yolo_qconfig_mapping",
    "graphed",
    "histogram",
    "load_converted",
    "load_qconfig_mapping",
    "load_torch_ao_state_dict",
    "nn",
    "oscillation_dampening",
    "parameter_groups",
    "prepare_qat",
    "quantize_bias",
    "quantize_weights_together",
    "range_to_qparams",
    "recipe_for",
    "reestimate_batch_norm",
    "refine_scales",
    "restore",
    "save_converted",
    "save_qconfig_mapping",
    "search_frac_len",
    "set_fixed_point_phase",
    "statistic_frac_len",
    "summary",
    "sync_observers",
    "testing",
    "trained_threshold_quantize",
    "update_bn_stats",
    "use_backend",
    "use_in_torch",
    "verify",
]
