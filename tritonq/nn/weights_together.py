"""Quantize the folded weights of all Conv-BN layers of a model at the start of a step, in one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonq.backend import implementation, select
from tritonq.functional.conv_bn import ReadyWeight, version_of
from tritonq.functional.recomputation import is_recomputing
from tritonq.grid import Grid, RangeStatistics
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.fusable import observed_grid
from tritonq.reference.fold import nonzero_fold
from tritonq.reference.weight import WeightCodes


def quantize_weights_together(model: nn.Module) -> RemovableHandle:
    """Quantize the weights of all Conv-BN layers in one launch, each time ``model`` is called in training mode.

    There is one launch for each device. It helps models of small layers, whose steps are bound by the number of
    launches. Results are the same, bit for bit. Call it once for a model: each call adds a hook, which observes again.
    "Conv-BN layers" are all quantization-aware layers with a BatchNorm, linear ones among them.
    Only the forward changes; gradients still arrive layer by layer. All weights' codes exist at once, four bytes for
    each weight.

    Layers that the launch cannot take work as before: with another mode of folding than "approximate", a weight
    quantizer that is no plain `FakeQuantize` to integers with a min-max observer per channel (without groups or a
    process group), hooks, a frozen or synchronized BatchNorm, weights that aren't float32 or that something computes
    (weight_norm), or on a device without kernels. Under ``torch.compile`` nothing changes. It must not be used with
    sharded parameters (FSDP2), which are whole only inside of their layers.

    Args:
        model: a model with quantization-aware layers; the hook runs when this module is called, not its parts.

    Returns:
        The handle of the hook: its ``remove()`` makes each layer quantize its own weight again.

    Raises:
        ValueError: no Conv-BN layer in ``model``.

    Source: docs/conv-bn.md, "Modes of training".

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig()))
        >>> handle = quantize_weights_together(model)
        >>> model(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 4, 4, 4])
        >>> handle.remove()
    """
    if not any(isinstance(module, QATBatchNormLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no quantization-aware layer with BatchNorm: use prepare_qat first"
        )
    return model.register_forward_pre_hook(_make_ready)


@torch.no_grad()
def _make_ready(model: nn.Module, args: Any) -> None:
    """Quantize the weights of the layers in a model, as its forward pre-hook; one launch for each device."""
    if not model.training or torch.compiler.is_compiling() or is_recomputing():
        return
    found: dict[torch.device, list[tuple[QATBatchNormLayer, Grid, RangeStatistics]]] = {}
    for module in model.modules():
        if not isinstance(module, QATBatchNormLayer) or module.computed is not None:
            continue
        observed = _observed_grid_of(module)
        if observed is not None:
            found.setdefault(module.weight.device, []).append((module, *observed))
    for of_device in found.values():
        _make_layers_ready(*zip(*of_device, strict=True))


def _make_layers_ready(
    layers: Sequence[QATBatchNormLayer], grids: Sequence[Grid], statistics: Sequence[RangeStatistics]
) -> None:
    """Quantize the weights of layers on one device in one launch, and leave each layer its codes for this step.

    ``grids`` and ``statistics`` are those of the layers' weight quantizers, in the order of ``layers``.
    """
    fold, inverse_std = _folds(layers)
    rows = [layer.linear_map.to_rows(layer.weight.detach()) for layer in layers]
    made = implementation("weights_together", rows[0]).quantize_all(rows, fold, grids, statistics)
    counts = [len(weight) for weight in rows]
    parts = zip(layers, torch.split(fold, counts), torch.split(inverse_std, counts), made, strict=True)
    for layer, own_fold, own_inverse_std, codes in parts:
        layer.step_memory.ready = ReadyWeight(own_fold, own_inverse_std, WeightCodes(*codes), version_of(layer.weight))


def _observed_grid_of(layer: QATBatchNormLayer) -> tuple[Grid, RangeStatistics] | None:
    """Return grid and observed range of a layer's weight quantizer; None if the launch can't take the layer.

    It takes float32 weights on a device with kernels, with one scale per row, of layers that one operator trains.
    """
    weight = layer.weight
    if weight.dtype != torch.float32 or not layer.trains_in_one_operator or select(weight) != "triton":
        return None
    observed = observed_grid(layer.weight_fake_quant)
    return observed if observed is not None and observed[0].qtype.axis is not None else None


def _folds(layers: Sequence[QATBatchNormLayer]) -> tuple[Tensor, Tensor]:
    """Return the factors γ/σ (1/σ where γ is 0) and 1/σ of all layers' channels, one layer after the other.

    ``σ = sqrt(running_var + eps)``; both tensors are float32 (channels of all layers,).
    """
    if len({layer.bn.eps for layer in layers}) > 1:
        each = [_folds([layer]) for layer in layers]
        return torch.cat([fold for fold, _ in each]), torch.cat([inverse_std for _, inverse_std in each])
    variances = torch.cat([cast(Tensor, layer.bn.running_var).float() for layer in layers])
    ones = torch.ones_like(variances)
    gammas: list[Tensor] = [
        ones[: layer.bn.num_features] if layer.bn.weight is None else layer.bn.weight for layer in layers
    ]
    return nonzero_fold(variances, torch.cat(gammas), layers[0].bn.eps, torch.float32)
