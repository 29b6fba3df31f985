"""Switches of a prepared model: observation, rounding, BatchNorm statistics.

Each works on a module and everything inside it: ``enable_observer(model)`` and torch.ao's
``model.apply(enable_observer)`` do the same.
"""

from __future__ import annotations

from torch import nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.nn.batch_norm_layer import QATBatchNormLayer


def enable_observer(module: nn.Module) -> None:
    """Let fake quantizers update their ranges in training."""
    for quantizer in _quantizers(module):
        quantizer.enable_observer()


def disable_observer(module: nn.Module) -> None:
    """Freeze the ranges of fake quantizers."""
    for quantizer in _quantizers(module):
        quantizer.disable_observer()


def enable_fake_quant(module: nn.Module) -> None:
    """Let fake quantizers round."""
    for quantizer in _quantizers(module):
        quantizer.enable_fake_quant()


def disable_fake_quant(module: nn.Module) -> None:
    """Let values pass fake quantizers unrounded."""
    for quantizer in _quantizers(module):
        quantizer.disable_fake_quant()


def freeze_bn_stats(module: nn.Module) -> None:
    """Normalise fused BatchNorms with their running statistics, in training too, and stop updating these.

    Fixed-point layers go on training with the statistics of each batch, as F8Net does.
    """
    for layer in module.modules():
        if isinstance(layer, QATBatchNormLayer):
            layer.freeze_bn_stats()


def update_bn_stats(module: nn.Module) -> None:
    """Undo :func:`freeze_bn_stats`."""
    for layer in module.modules():
        if isinstance(layer, QATBatchNormLayer):
            layer.update_bn_stats()


def _quantizers(module: nn.Module) -> list[FakeQuantizeBase]:
    return [child for child in module.modules() if isinstance(child, FakeQuantizeBase)]
