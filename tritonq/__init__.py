"""tritonq: quantization-aware training at the speed of float training, deployed to the numbers it was trained with."""

from importlib import import_module
from typing import TYPE_CHECKING

from tritonq import nn
from tritonq.backend import use_backend
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
from tritonq.learned_bits import LearnedBitsFakeQuantize, fix_learned_bits, learned_size
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
from tritonq.paper_schemes import BinaryWeight, DoReFaActivation, DoReFaWeight, TernaryWeight
from tritonq.parameter_groups import parameter_groups
from tritonq.qconfig import (
    QConfig,
    default_embedding_qat_qconfig,
    default_qat_qconfig,
    get_default_qat_qconfig,
    get_qconfig,
)
from tritonq.qconfig_mapping import QConfigMapping
from tritonq.qparams import range_to_qparams
from tritonq.quantized_type import QuantizedType
from tritonq.version import __version__

if TYPE_CHECKING:
    from tritonq import acceleration, testing
    from tritonq.acceleration import accelerate, restore
    from tritonq.accuracy.adaptive_rounding import adaptive_round
    from tritonq.accuracy.bias_correction import correct_bias
    from tritonq.accuracy.bit_allocation import allocate_bits
    from tritonq.accuracy.distillation import Distillation
    from tritonq.accuracy.equalization import equalize
    from tritonq.accuracy.history import QuantizerHistory, QuantizerRecord
    from tritonq.accuracy.oscillation import OscillationFreezing, oscillation_dampening
    from tritonq.accuracy.reestimation import reestimate_batch_norm
    from tritonq.calibration import calibrate, refine_scales
    from tritonq.deploy import export_encodings, export_onnx, export_program, load_converted, save_converted
    from tritonq.deploy.convert import convert
    from tritonq.deploy.torch_ao import load_torch_ao_state_dict
    from tritonq.deploy.verify import verify
    from tritonq.distributed import broadcast_statistics, sync_observers
    from tritonq.graphs import graphed
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
    from tritonq.qconfig_files import load_qconfig_mapping, save_qconfig_mapping
    from tritonq.recipes import TrainingRecipe, recipe_for
    from tritonq.report.summary import summary
    from tritonq.torch_operators import use_in_torch

__all__ = [
    "BinaryWeight",
    "ClippedFakeQuantize",
    "DeQuantStub",
    "Distillation",
    "DoReFaActivation",
    "DoReFaWeight",
    "FakeQuantize",
    "FixedPointFakeQuantize",
    "FloatFakeQuantize",
    "HistogramObserver",
    "InterpolatingHistogramObserver",
    "LearnedBitsFakeQuantize",
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
    "TernaryWeight",
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
    "export_encodings",
    "export_onnx",
    "export_program",
    "fake_quantize_float",
    "fake_quantize_learnable",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fix_learned_bits",
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
    "learned_size",
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

# Parts that a script may do without, imported when one of their names is first used: half of what there is to import.
_LATER = {
    "Distillation": "tritonq.accuracy.distillation",
    "OscillationFreezing": "tritonq.accuracy.oscillation",
    "QuantizerHistory": "tritonq.accuracy.history",
    "QuantizerRecord": "tritonq.accuracy.history",
    "TrainingRecipe": "tritonq.recipes",
    "accelerate": "tritonq.acceleration",
    "adaptive_round": "tritonq.accuracy.adaptive_rounding",
    "allocate_bits": "tritonq.accuracy.bit_allocation",
    "broadcast_statistics": "tritonq.distributed",
    "calibrate": "tritonq.calibration",
    "convert": "tritonq.deploy.convert",
    "correct_bias": "tritonq.accuracy.bias_correction",
    "disable_fake_quant": "tritonq.prepare",
    "disable_observer": "tritonq.prepare",
    "enable_fake_quant": "tritonq.prepare",
    "enable_observer": "tritonq.prepare",
    "equalize": "tritonq.accuracy.equalization",
    "export_encodings": "tritonq.deploy",
    "export_onnx": "tritonq.deploy",
    "export_program": "tritonq.deploy",
    "freeze_bn_stats": "tritonq.prepare",
    "fuse_modules_qat": "tritonq.prepare",
    "get_qconfig_mapping": "tritonq.preset_mappings",
    "get_yolo_qconfig_mapping": "tritonq.preset_mappings",
    "graphed": "tritonq.graphs",
    "load_converted": "tritonq.deploy",
    "load_qconfig_mapping": "tritonq.qconfig_files",
    "load_torch_ao_state_dict": "tritonq.deploy.torch_ao",
    "oscillation_dampening": "tritonq.accuracy.oscillation",
    "prepare_qat": "tritonq.prepare",
    "recipe_for": "tritonq.recipes",
    "reestimate_batch_norm": "tritonq.accuracy.reestimation",
    "refine_scales": "tritonq.calibration",
    "restore": "tritonq.acceleration",
    "save_converted": "tritonq.deploy",
    "save_qconfig_mapping": "tritonq.qconfig_files",
    "summary": "tritonq.report.summary",
    "sync_observers": "tritonq.distributed",
    "update_bn_stats": "tritonq.prepare",
    "use_in_torch": "tritonq.torch_operators",
    "verify": "tritonq.deploy.verify",
}
_PARTS = {"acceleration", "accuracy", "calibration", "deploy", "distributed", "graphs", "prepare", "preset_mappings"}
_PARTS |= {"qconfig_files", "recipes", "report", "testing", "torch_ao", "torch_operators"}

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name):
        """Import and return the public name or submodule ``name``, which ``import tritonq`` does not import at once."""
        if name in _LATER:
            found = getattr(import_module(_LATER[name]), name)
        elif name in _PARTS:
            found = import_module(f"tritonq.{name}")
        else:
            raise AttributeError(f"module 'tritonq' has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__():
        """Return all names of the package, those that are imported later as well."""
        return sorted({*globals(), *_LATER, *_PARTS})
