"""Presets for a whole model, as mappings from layers to qconfigs.

With few bits the first and the last layer get other quantizers, and so do the heads of detectors.
"""

from __future__ import annotations

from torch import nn

from tritonq.qconfig import DEFAULT_PRESET, get_qconfig
from tritonq.qconfig_mapping import QConfigMapping

# Presets whose ends want 8 bits.
_FEW_BITS = ("lsq_", "dorefa_", "bwn_", "twn_", "learned_bits_")


def get_qconfig_mapping(name: str = DEFAULT_PRESET) -> QConfigMapping:
    """Return a preset by name as a mapping for :func:`tritonq.prepare_qat`.

    For a preset of LSQ, DoReFa-Net, binary or ternary weights or trained bits (``"lsq_w4a4"`` and the like), the first
    and the last layer's weights, the last layer's output and the model's inputs have 8 bits: few values pass there, and
    rounding them costs most. So has the result of a mean or pooling right before the last layer. For a preset of groups
    or of weights in blocks (``"w4_g32"``, ``"w_mxfp4"``) the first layer's weight has 8 bits and a scale per channel:
    images have three channels. Any other preset holds for every layer.

    Args:
        name: a preset of :func:`tritonq.get_qconfig`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Source: Esser et al. (2020), LSQ, section 3: "the first and last layer of each network were quantized to 8 bits".

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 4, 3))
        >>> mapping = tritonq.get_qconfig_mapping("lsq_w4a4")
        >>> prepared = tritonq.prepare_qat(model, qconfig=mapping, example_inputs=torch.randn(2, 3, 8, 8))
        >>> [layer.weight_fake_quant.qtype.bits for layer in prepared]
        [8, 4, 8]
    """
    preset = get_qconfig(name)
    mapping = QConfigMapping().set_global(preset)
    weight = preset.weight()
    has_blocks = getattr(weight, "blocks", None) is not None and name.startswith("w_")
    has_groups = has_blocks or getattr(getattr(weight, "qtype", None), "group", None) is not None
    if not name.startswith(_FEW_BITS) and not has_groups:
        return mapping
    edge = get_qconfig(DEFAULT_PRESET)
    first = preset._replace(weight=edge.weight, folding=None)
    if has_groups:
        return mapping.set_first_layer(first)
    return mapping.set_first_layer(first).set_last_layer(edge).set_input(edge)


# What the heads of YOLO models keep beside their convolutions: strides of the feature maps, or anchors.
_HEAD_ATTRIBUTES = ("stride", "strides", "anchors")
# Turns distributions over distances into boxes, by a convolution with fixed weights.
_DECODER = "dfl"


def get_yolo_qconfig_mapping(model: nn.Module, name: str = DEFAULT_PRESET) -> QConfigMapping:
    """Return a mapping for a YOLO detector: a preset, but in float what makes and decodes boxes and scores.

    A head is a module that keeps ``stride``, ``strides`` or ``anchors`` and has branches: a ``ModuleList`` with, for
    each feature map, a convolution or a ``Sequential`` that ends in one. So have Ultralytics' (YOLOv8 and later, with
    masks, poses and rotated boxes too), YOLOv5's and YOLOX's. Their last convolutions, their child ``dfl`` (it turns
    distributions over distances into boxes) and the arithmetic on boxes stay in float: few operations are among them,
    and rounding coordinates costs much accuracy. Everything else is as in :func:`get_qconfig_mapping`.

    Args:
        model: the float model.
        name: a preset of :func:`tritonq.get_qconfig`.

    Raises:
        ValueError: an unknown name, or a model without such a head.

    Examples:
        >>> import torch, tritonq
        >>> class Head(torch.nn.Module):
        ...     stride = (8,)
        ...     def __init__(self):
        ...         super().__init__()
        ...         first, last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 6, 1)
        ...         self.branch = torch.nn.ModuleList([torch.nn.Sequential(first, torch.nn.ReLU(), last)])
        ...     def forward(self, maps):
        ...         return [layers(x) for layers, x in zip(self.branch, maps)]
        >>> model, maps = Head(), [torch.randn(2, 3, 8, 8)]
        >>> mapping = get_yolo_qconfig_mapping(model)
        >>> qat = tritonq.prepare_qat(model, qconfig=mapping, example_inputs=(maps,), warn=False)
        >>> type(qat.branch[0][0]).__module__, type(qat.branch[0][2]).__module__
        ('tritonq.nn.conv', 'torch.nn.modules.conv')
    """
    preset = get_qconfig(name)
    mapping = get_qconfig_mapping(name)
    has_head = False
    for path, head in model.named_modules():
        outputs = _output_convolutions(head)
        if not outputs:
            continue
        has_head = True
        prefix = f"{path}." if path else ""
        if path:
            mapping = mapping.set_module_name(path, None)
        for child, _ in head.named_children():
            mapping = mapping.set_module_name(prefix + child, None if child == _DECODER else preset)
        for output in outputs:
            mapping = mapping.set_module_name(prefix + output, None)
    if not has_head:
        raise ValueError(
            f"no head of a detector in this {type(model).__name__}: no module with {', '.join(_HEAD_ATTRIBUTES)} and "
            "a ModuleList of branches that end in convolutions; name its outputs by QConfigMapping.set_module_name"
        )
    return mapping


def _output_convolutions(head: nn.Module) -> list[str]:
    """Return the names, within ``head``, of the convolutions at the end of its branches.

    ``[]`` means that ``head`` is no detector's head.
    """
    if not any(hasattr(head, attribute) for attribute in _HEAD_ATTRIBUTES):
        return []
    found = []
    for name, branches in head.named_children():
        for level, layers in enumerate(branches if isinstance(branches, nn.ModuleList) else ()):
            path = f"{name}.{level}"
            if isinstance(layers, nn.Sequential) and len(layers):
                path, layers = f"{path}.{len(layers) - 1}", layers[-1]
            if isinstance(layers, nn.Conv2d):
                found.append(path)
    return found
