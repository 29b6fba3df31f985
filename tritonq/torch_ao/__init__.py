"""The names of ``torch.ao.quantization``, with tritonq's modules behind them, for scripts that change their imports.

``from torch.ao.quantization import …`` and ``from torch.ao.quantization.quantize_fx import …`` become ``from
tritonq.torch_ao import …``. Names, order of arguments and defaults are torch.ao's. Names that ``tritonq`` has with the
same meaning are found here too. docs/coming-from-torch-ao.md lists what has no counterpart, and why.
"""

from tritonq.fake_quantize import FakeQuantize as FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase as FakeQuantizeBase
from tritonq.nn import DeQuantStub as DeQuantStub
from tritonq.nn import FloatFunctional as FloatFunctional
from tritonq.nn import QuantStub as QuantStub
from tritonq.observers import HistogramObserver as HistogramObserver
from tritonq.observers import MinMaxObserver as MinMaxObserver
from tritonq.observers import MovingAverageMinMaxObserver as MovingAverageMinMaxObserver
from tritonq.observers import MovingAveragePerChannelMinMaxObserver as MovingAveragePerChannelMinMaxObserver
from tritonq.observers import ObserverBase as ObserverBase
from tritonq.observers import PerChannelMinMaxObserver as PerChannelMinMaxObserver
from tritonq.prepare import disable_fake_quant as disable_fake_quant
from tritonq.prepare import disable_observer as disable_observer
from tritonq.prepare import enable_fake_quant as enable_fake_quant
from tritonq.prepare import enable_observer as enable_observer
from tritonq.prepare import fuse_modules_qat as fuse_modules_qat
from tritonq.prepare import prepare_qat as prepare_qat
from tritonq.qconfig import QConfig as QConfig
from tritonq.qconfig import default_embedding_fake_quant as default_embedding_fake_quant
from tritonq.qconfig import default_embedding_qat_qconfig as default_embedding_qat_qconfig
from tritonq.qconfig import default_fake_quant as default_fake_quant
from tritonq.qconfig import default_per_channel_weight_fake_quant as default_per_channel_weight_fake_quant
from tritonq.qconfig import default_qat_qconfig as default_qat_qconfig
from tritonq.qconfig import default_weight_fake_quant as default_weight_fake_quant
from tritonq.qconfig import get_default_qat_qconfig as get_default_qat_qconfig
from tritonq.torch_ao.defaults import (
    FusedMovingAvgObsFakeQuantize,
    default_affine_fixed_qparams_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_histogram_fake_quant,
    default_histogram_observer,
    default_observer,
    default_per_channel_qconfig,
    default_per_channel_symmetric_qnnpack_qat_qconfig,
    default_per_channel_weight_observer,
    default_qat_qconfig_v2,
    default_qconfig,
    default_symmetric_fixed_qparams_fake_quant,
    default_symmetric_qnnpack_qat_qconfig,
    default_weight_observer,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
    get_default_qat_module_mappings,
    get_default_qconfig,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from tritonq.torch_ao.flows import convert, convert_fx, fuse_modules, prepare_qat_fx, quantize, quantize_qat
from tritonq.torch_ao.mapping import QConfigMapping, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from tritonq.torch_ao.wrappers import QuantWrapper, add_quant_dequant, propagate_qconfig_, swap_module

__all__ = [
    "FusedMovingAvgObsFakeQuantize",
    "QConfigMapping",
    "QuantWrapper",
    "add_quant_dequant",
    "convert",
    "convert_fx",
    "default_affine_fixed_qparams_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_weight_observer",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_weight_observer",
    "fuse_modules",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "get_default_qat_module_mappings",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "per_channel_weight_observer_range_neg_127_to_127",
    "prepare_qat_fx",
    "propagate_qconfig_",
    "quantize",
    "quantize_qat",
    "swap_module",
    "weight_observer_range_neg_127_to_127",
]
