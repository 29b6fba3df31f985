"""Find weights whose channels get zero points of their own, which engines run slowly or not at all.

A *one-sided* filter is a weight channel whose values have one sign.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.nn.qat import QATLayer


@torch.no_grad()
def one_sided_layers(model: nn.Module) -> list[str]:
    """Return the qualified names of quantization-aware layers with one-sided filters that get their own zero points.

    Such a layer's weight quantizer is symmetric, per channel, and its observer has ``rule="torch_v1"``: torch.ao's
    fused operator, which gives even symmetric types another zero point where a channel's values have one sign. Weights
    are read on the host, before a BatchNorm is folded in; those on the device "meta", without values, are left out.
    """
    return [name for name, layer in model.named_modules() if isinstance(layer, QATLayer) and _is_one_sided(layer)]


def _is_one_sided(layer: QATLayer) -> bool:
    """Whether a layer has a filter with values of one sign, and a weight quantizer to which that gives a zero point.

    The quantizer is symmetric, per channel, with ``rule="torch_v1"``.
    """
    quantizer = layer.weight_fake_quant
    if not isinstance(quantizer, FakeQuantize) or quantizer.qtype.axis is None or not quantizer.qtype.symmetric:
        return False
    if getattr(quantizer.activation_post_process, "rule", None) != "torch_v1":
        return False
    rows = layer.linear_map.to_rows(layer.float_parameters()[0]).flatten(1)
    return not rows.is_meta and bool(((rows.amin(1) >= 0) | (rows.amax(1) <= 0)).any())


def warn_of_weight_zero_points(names: Sequence[str], stacklevel: int) -> None:
    """Warn (UserWarning) of layers whose weight zero points differ between channels, and say what to do.

    Args:
        names: the layers' qualified names; nothing happens if there are none.
        stacklevel: whose line the warning names: 1 for the function that calls this one, 2 for its caller.
    """
    if names:
        warnings.warn(
            f"weight zero points differ between channels in {', '.join(names)}: torch.ao's version 1 gives one to each "
            "filter of one sign. ONNX Runtime 1.18 to 1.26 fails at the first run of such layers, later versions run "
            'them slower than float, OpenVINO in float; get_qconfig("onnxruntime") has symmetric weights',
            stacklevel=stacklevel + 1,
        )
