"""Presets as mappings: with first and last layer and inputs at 8 bits, where the preset has fewer."""

from __future__ import annotations

from tritonq.qconfig import DEFAULT_PRESET, QConfig, get_qconfig
from tritonq.qconfig_mapping import QConfigMapping


def get_qconfig_mapping(name: str = DEFAULT_PRESET) -> QConfigMapping:
    """A preset by name as a mapping for :func:`tritonq.prepare_qat`.

    For a preset of trained scales (``"lsq_w4a4"`` and the like) the first layer's weight, the last layer's weight,
    input and output, and the model's inputs have 8 bits: few values pass there, and rounding them costs most. Any
    other preset holds for every layer.

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
    if not name.startswith("lsq_"):
        return mapping
    edge = get_qconfig(DEFAULT_PRESET)
    first = QConfig(preset.activation, edge.weight, preset.target, round_summands=preset.round_summands)
    return mapping.set_first_layer(first).set_last_layer(edge).set_input(edge)
