"""Groups of parameters for an optimizer: which decay, and which learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.learned_base import LearnedFakeQuantize

_NORMALIZATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups, each once, as every optimizer of ``torch.optim`` takes them.

    Weight decay pulls towards 0, which regularizes weights, but narrows the grid of a trained scale, threshold or zero
    point, and shrinks a normalization. So weights and biases decay; normalizations and quantizers do not.

    Args:
        model: a model, prepared or not. Parameters that require no gradient are left out.
        lr: learning rate.
        weight_decay: of weights and biases.
        scale_lr: learning rate of quantizers; None: ``lr``.

    Returns:
        Up to three dicts with ``name``, ``params``, ``lr`` and ``weight_decay``: ``"weights"``, ``"normalizations"``
        and ``"quantizers"``; one without parameters is left out.

    Raises:
        ValueError: a learning rate or a decay that is negative, or a model without trainable parameters.

    Source: Esser et al. (2020) and Jain et al. (2020), whose scales and thresholds do not decay; He et al. (2019),
        "Bag of Tricks", for normalizations.

    Examples:
        >>> import torch, tritonq
        >>> quantizer = tritonq.LearnedStepFakeQuantize.with_args(dtype="qint8")
        >>> model = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.QConfig(quantizer, quantizer))
        >>> groups = tritonq.parameter_groups(model, lr=0.1, weight_decay=1e-4, scale_lr=0.01)
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
        >>> [(group["name"], len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 1, 0.1, 0.0001), ('normalizations', 2, 0.1, 0.0), ('quantizers', 2, 0.01, 0.0)]
    """
    scale_lr = lr if scale_lr is None else scale_lr
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("scale_lr", scale_lr)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    found: dict[str, list[nn.Parameter]] = {"weights": [], "normalizations": [], "quantizers": []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        found[_group_of(module)] += [parameter for parameter in own if parameter not in seen]
        seen.update(own)
    settings = {"weights": (lr, weight_decay), "normalizations": (lr, 0.0), "quantizers": (scale_lr, 0.0)}
    groups = [
        {"name": name, "params": parameters, "lr": settings[name][0], "weight_decay": settings[name][1]}
        for name, parameters in found.items()
        if parameters
    ]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return groups


def _group_of(module: nn.Module) -> str:
    if isinstance(module, (LearnedFakeQuantize, FixedPointFakeQuantize)):
        return "quantizers"
    return "normalizations" if isinstance(module, _NORMALIZATIONS) else "weights"
