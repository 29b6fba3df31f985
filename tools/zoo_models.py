"""The models that `make zoo` tries, as their libraries make them, with random weights; nothing is downloaded.

A model is named ``library/model``. To add one, add its name to the list of its library.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Example:
    """A model, and the inputs with which it is called.

    Attributes:
        model: the float model.
        inputs: arguments in eval mode.
        training_inputs: arguments in training mode, where those are others.
    """

    model: nn.Module
    inputs: Any
    training_inputs: Any = None


@dataclass(frozen=True)
class Library:
    """The models of one library.

    Attributes:
        make: builds a model by its name, for images of a size.
        models: their names.
        sizes: the size of images for models that don't take 64 pixels.
    """

    make: Callable[[str, int], Example]
    models: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)


SIZE = 64


def example(name: str) -> Example:
    """Build a model by its full name."""
    library, _, model = name.partition("/")
    found = LIBRARIES[library]
    torch.manual_seed(0)
    return found.make(model, found.sizes.get(model, SIZE))


def names() -> list[str]:
    """Return the names of all models."""
    return [f"{library}/{model}" for library, found in LIBRARIES.items() for model in found.models]


def images(size: int, batch: int = 2) -> Tensor:
    """Return a batch of random images of ``size`` × ``size`` pixels."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _torchvision(name: str, size: int) -> Example:
    models = importlib.import_module("torchvision.models")

    if name in _DETECTORS:
        arguments = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        # That one has a size of its own.
        sizes = {} if name.startswith("ssdlite320") else {"min_size": size, "max_size": size}
        model = models.get_model(name, **arguments, **sizes)
        pictures = list(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
        target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        return Example(model, (pictures,), (pictures, [target, target]))
    if name in _SEGMENTERS:
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    elif name in _VIDEO:
        clip = torch.randn(2, 3, 8, size, size, generator=torch.Generator().manual_seed(1))
        return Example(models.get_model(name, weights=None, num_classes=CLASSES), clip)
    else:
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return Example(model, images(size))


def _timm(name: str, size: int) -> Example:
    timm = importlib.import_module("timm")

    try:
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=size)
    except TypeError:  # convolutional networks take any size
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return Example(model, images(size))


def _transformers(name: str, size: int) -> Example:
    transformers = importlib.import_module("transformers")

    options = dict(_TRANSFORMERS[name])
    if name in _BACKBONES:
        kind, arguments = _BACKBONES[name]
        options["backbone_config"] = getattr(transformers, kind)(layer_type="basic", **arguments)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    if hasattr(config, "image_size"):
        config.image_size = size
    kind = getattr(transformers, _CLASSES.get(name, f"{name}ForImageClassification"))
    if name == "RTDetr":
        importlib.import_module(kind.__module__).torch = _TiesByPlace()  # type: ignore[attr-defined]
    return Example(kind(config), {"pixel_values": images(size)})


class _TiesByPlace:
    """Stands in for torch in a library: its `topk` takes equal values in the order of their places, as ONNX does.

    torch's own order is open. On a grid of 256 codes many scores are equal, and which of them are chosen decides all
    that follows.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def topk(input: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Return the largest values and their places, equal ones in order; in an ONNX file it is ONNX's operator."""
        if torch.compiler.is_exporting():
            return torch.topk(input, k, dim)
        values, places = torch.sort(input, dim=dim, descending=True, stable=True)
        return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def _smp(name: str, size: int) -> Example:
    smp = importlib.import_module("segmentation_models_pytorch")

    decoder, _, encoder = name.partition("-")
    model = smp.create_model(decoder, encoder_name=encoder, encoder_weights=None, classes=CLASSES)
    return Example(model, images(size))


def _ultralytics(name: str, size: int) -> Example:
    yolo = importlib.import_module("ultralytics").YOLO
    return Example(yolo(f"{name}.yaml", verbose=False).model, images(size))


def _efficientnet_pytorch(name: str, size: int) -> Example:
    kind = importlib.import_module("efficientnet_pytorch").EfficientNet
    return Example(kind.from_name(name, num_classes=CLASSES, image_size=size), images(size))


def _pytorchcv(name: str, size: int) -> Example:
    get_model = importlib.import_module("pytorchcv.model_provider").get_model
    return Example(get_model(name, pretrained=False, num_classes=CLASSES, in_size=(size, size)), images(size))


_DETECTORS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn")
_SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
_NARROW = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": {**_NARROW, "layer_type": "basic"},
    "RegNet": {**_NARROW, "groups_width": 8},
    "MobileNetV1": {},
    "MobileNetV2": {},
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "ConvNextV2": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "Bit": {**_NARROW, "num_groups": 4},
    "PoolFormer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "MobileViT": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    "ViT": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "DeiT": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "Dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16},
    "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "CLIPVision": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "Detr": {
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "use_timm_backbone": False},
        **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    },
    "RTDetr": {
        **{"d_model": 32, "encoder_hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 20},
        **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3, "use_pretrained_backbone": False},
    },
    "Segformer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
}

# What detectors read images with: the class of its configuration, and how small it is.
_BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "Detr": ("ResNetConfig", {**_NARROW, "out_features": ["stage2"]}),
    "RTDetr": (
        "RTDetrResNetConfig",
        {
            **{"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4},
            "out_features": ["stage2", "stage3", "stage4"],
        },
    ),
}
# What is no image classifier.
_CLASSES = {
    **{"CLIPVision": "CLIPVisionModel", "Detr": "DetrForObjectDetection"},
    "RTDetr": "RTDetrForObjectDetection",
}

_PYTORCHCV = (
    *("resnet10", "preresnet10", "mobilenet_wd4", "mobilenetv2_wd4", "shufflenetv2_wd2", "squeezenet_v1_1"),
    *("seresnet10", "igcv3_wd4", "darknet_tiny", "menet108_8x1_g3"),
)

LIBRARIES: dict[str, Library] = {
    "torchvision": Library(
        _torchvision,
        (
            *("alexnet", "vgg11_bn", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121"),
            *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x0_5"),
            *("squeezenet1_1", "googlenet", "inception_v3", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf"),
            *("regnet_x_400mf", "convnext_tiny", "vit_b_32", "swin_t", "maxvit_t", *_SEGMENTERS, *_VIDEO, *_DETECTORS),
        ),
        {
            **{"inception_v3": 299, "vit_b_32": 224, "maxvit_t": 224, "ssdlite320_mobilenet_v3_large": 320},
            **dict.fromkeys(_VIDEO, 32),
        },
    ),
    "timm": Library(
        _timm,
        (
            *("resnet18", "resnet26d", "resnet50", "resnetv2_50", "resnetv2_50x1_bit", "seresnet18", "ecaresnet26t"),
            *("resnest14d", "skresnet18", "res2net50_14w_8s", "dla34", "densenet121", "vovnet39a", "selecsls42b"),
            *(
                "mobilenetv2_050",
                "mobilenetv3_small_050",
                "mobilenetv3_large_100",
                "mobilenetv4_conv_small",
                "lcnet_050",
            ),
            *("tf_mobilenetv3_small_minimal_100", "mnasnet_small", "efficientnet_b0"),
            *("tf_efficientnet_b0", "mixnet_s"),
            *("tf_mixnet_s", "efficientnet_lite0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "fbnetc_100"),
            *(
                "spnasnet_100",
                "hardcorenas_a",
                "ghostnet_050",
                "ghostnetv2_100",
                "tinynet_e",
                "rexnet_100",
                "repvgg_a0",
            ),
            *(
                "repghostnet_050",
                "mobileone_s0",
                "fastvit_t8",
                "regnetx_002",
                "regnety_002",
                "regnetz_005",
                "cspresnet50",
            ),
            *("cspdarknet53", "darknet53", "hrnet_w18_small", "nfnet_f0"),
            *("dm_nfnet_f0", "nf_resnet26", "eca_nfnet_l0"),
            *(
                "convnext_atto",
                "convnextv2_atto",
                "inception_v4",
                "xception41",
                "inception_next_tiny",
                "edgenext_xx_small",
            ),
            *("mobilevit_xxs", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "poolformer_s12"),
            *("levit_128s", "efficientformer_l1", "tiny_vit_5m_224", "swin_tiny_patch4_window7_224", "pit_ti_224"),
        ),
        {
            **{"vit_tiny_patch16_224": 64, "levit_128s": 224, "efficientformer_l1": 224, "tiny_vit_5m_224": 224},
            **{"swin_tiny_patch4_window7_224": 224, "pit_ti_224": 224, "inception_v4": 128, "mixer_s32_224": 224},
            **{"deit_tiny_patch16_224": 64, "hrnet_w18_small": 128},
        },
    ),
    "transformers": Library(_transformers, tuple(_TRANSFORMERS)),
    "segmentation_models_pytorch": Library(
        _smp,
        (
            *("unet-resnet18", "unetplusplus-resnet18", "manet-resnet18", "linknet-resnet18", "fpn-resnet18"),
            *(
                "pspnet-resnet18",
                "pan-resnet18",
                "deeplabv3-resnet18",
                "deeplabv3plus-mobilenet_v2",
                "upernet-resnet18",
            ),
            "unet-efficientnet-b0",
        ),
        {"pan-resnet18": 128},
    ),
    "ultralytics": Library(
        _ultralytics,
        (*("yolov3-tiny", "yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-cls", "yolov9t", "yolov10n", "yolo11n"),),
    ),
    "efficientnet_pytorch": Library(_efficientnet_pytorch, ("efficientnet-b0", "efficientnet-b1")),
    "pytorchcv": Library(
        _pytorchcv,
        _PYTORCHCV,
        dict.fromkeys(_PYTORCHCV, 224),
    ),
}
