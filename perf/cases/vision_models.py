"""torchvision's models with fixed random weights; nothing is downloaded.

Without torchvision there are the ResNets of `tritonq.perf.cases.resnet`, which are the same networks.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import nn

_OPERATORS = ("nms", "qnms")


def torchvision_model(name: str, num_classes: int) -> nn.Module:
    """Return a float model, with the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not has_torchvision():
            from tritonq.perf.cases.resnet import resnet

            return resnet(name, num_classes)
        import_torchvision()
        from torchvision import models

        return _without_dropout(models.get_model(name, weights=None, num_classes=num_classes))


def quantizable(name: str, num_classes: int) -> nn.Module:
    """Return a model as torch.ao needs it.

    It has quantization stubs, additions as modules, and a method ``fuse_model``.
    """
    if not has_torchvision():
        from tritonq.perf.cases.resnet import resnet

        return resnet(name, num_classes, quantizable=True)
    import_torchvision()
    from torchvision import models

    model = models.get_model(f"quantized_{name}", weights=None, num_classes=num_classes, quantize=False)
    return _without_dropout(model)


def _without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off in place, because two implementations would draw different numbers; return the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def has_torchvision() -> bool:
    """Whether torchvision is installed."""
    return importlib.util.find_spec("torchvision") is not None


@cache
def import_torchvision() -> tuple[torch.library.Library, ...]:
    """Import torchvision, also if its compiled operators were built for another torch.

    Two of these operators are then declared first, because importing needs them.

    Returns:
        The library that holds the declarations, which must live as long as they; empty if none were needed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return ()
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return (library,)
