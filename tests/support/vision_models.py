"""Models as their libraries ship them, with random weights and small enough for a CPU; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import nn

_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Kept alive: a library's definitions go away with it.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, also beside a torch build whose compiled torchvision operators are missing.

    torchvision registers fake implementations for its operators on import and fails where they don't exist. None of the
    models here uses them, so declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in _TORCHVISION_OPERATORS:
            library.define(operator)
        _libraries.append(library)
        import torchvision  # noqa: F401


def torchvision_model(name: str, **arguments: object) -> nn.Module:
    """Return a torchvision model with ten classes and random weights."""
    import_torchvision()
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10, **arguments)


def torchvision_residual_network(depths: list[int]) -> nn.Module:
    """Return a torchvision ResNet of basic blocks, with ten classes and random weights."""
    import_torchvision()
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, depths, num_classes=10)


def torchvision_dense_network(depths: tuple[int, ...]) -> nn.Module:
    """Return a torchvision DenseNet with so many layers in each block, ten classes and random weights."""
    import_torchvision()
    from torchvision.models import DenseNet

    return DenseNet(block_config=depths, num_classes=10)


def timm_model(name: str, **arguments: object) -> nn.Module:
    """Return a timm model with ten classes and random weights."""
    import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **arguments)


def transformers_resnet(layer_type: str = "basic") -> nn.Module:
    """Return a narrow ResNet of transformers, which torch.fx can't trace whole."""
    import_torchvision()
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=10)
    return ResNetForImageClassification(config)


def transformers_mobilenet_v2() -> nn.Module:
    """Return a narrow MobileNetV2 of transformers, with its padding computed in the forward."""
    import_torchvision()
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, num_labels=10, image_size=32))
