"""How images become a model's input: sizes, crop and scaling, by name, by option, or from the model's own config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from tritonq.cli.earlier_fields import with_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = 3
_GREY = 1
_SIZE_OF_PHOTOS = 32
_SIZE_OF_DIGITS = 8
# Mean and deviation of ImageNet's pixels, as torchvision and timm write them.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224
# Both libraries cut 224 pixels out of 256.
_CROP_SHARE = 0.875

Crop = Literal["stretch", "center"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image file to a model's input, as plain data that every file with a model can hold.

    An image is scaled, its centre is cut out, and ``(pixels / 255 - mean) / std`` is what the model reads.

    Attributes:
        size: side of the model's input, in pixels.
        resize: side that the image is scaled to before the central ``size`` × ``size`` is cut out.
        crop: ``"stretch"`` scales to ``resize`` × ``resize``; ``"center"`` scales the shorter side to ``resize`` and
            keeps the ratio.
        interpolation: name of Pillow's filter, in small letters: "nearest", "bilinear", "bicubic", "lanczos", "box" or
            "hamming".
        mean: per channel, of pixels from 0 to 1. Empty: not known yet; :meth:`with_moments` fills in that of the
            training images.
        std: deviation per channel, as ``mean``.
        channels: 3 for colours, 1 for grey.

    Raises:
        ValueError: an empty image, a crop larger than the scaled image, an unknown crop or interpolation, other
            channels than 1 or 3; mean or deviation of another length than ``channels`` or not finite; a deviation that
            is not positive.
    """

    size: int
    resize: int
    crop: Crop = "stretch"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = COLOURS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"images have at least one pixel, got size {self.size}")
        if self.resize < self.size:
            raise ValueError(f"{self.size} pixels can't be cut out of {self.resize}: --resize is at least --image-size")
        if self.crop not in get_args(Crop) or self.interpolation not in get_args(Interpolation):
            raise ValueError(f"no such preprocessing: crop {self.crop!r}, interpolation {self.interpolation!r}")
        if self.channels not in (_GREY, COLOURS):
            raise ValueError(f"images are read in {_GREY} or {COLOURS} channels, got {self.channels}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, images have {self.channels} channels")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be finite, got {values}")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")

    def with_moments(self, mean: float, std: float) -> Preprocessing:
        """Return a copy with this mean and deviation in all channels, or the object itself if it has a mean already.

        Both are those of pixels from 0 to 1.
        """
        if self.mean:
            return self
        return replace(self, mean=(mean,) * self.channels, std=(std,) * self.channels)

    def pixels(self, image: Image) -> Tensor:
        """Turn an image to colours or grey, scale and crop it; return uint8 (channels, size, size), 0..255."""
        from PIL.Image import Resampling

        image = image.convert("RGB" if self.channels == COLOURS else "L")
        width, height = image.size
        if self.crop == "stretch":
            scaled = (self.resize, self.resize)
        elif width <= height:  # torchvision's rounding, which timm shares
            scaled = (self.resize, int(self.resize * height / width))
        else:
            scaled = (int(self.resize * width / height), self.resize)
        image = image.resize(scaled, Resampling[self.interpolation.upper()])
        left, top = (round((side - self.size) / 2.0) for side in scaled)
        if scaled != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return self.as_pixels(image)

    def as_pixels(self, image: Image) -> Tensor:
        """Return the values of an image that already has the right size and mode: uint8 (channels, size, size), 0..255.

        The mode is "RGB" for 3 channels and "L" for 1; nothing is converted here, or scaled by ``mean`` and ``std``.
        """
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(self.size, self.size, self.channels).permute(2, 0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return ``(x - mean) / std`` as float32, for ``pixels`` (..., channels, height, width) on the CPU.

        ``x`` is ``pixels / 255`` for uint8 pixels, and ``pixels`` itself for float32 from 0 to 1. ``mean`` and ``std``
        must not be empty; :meth:`with_moments` returns a copy that has them.
        """
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def example(self, count: int = 2) -> Tensor:
        """Return float32 (count, channels, size, size), an example of what the model reads.

        The values rise evenly from -1 to 1.
        """
        shape = (count, self.channels, self.size, self.size)
        return torch.linspace(-1, 1, math.prod(shape)).view(shape)

    def __str__(self) -> str:
        if self.crop == "center":
            scaled = f"shorter side to {self.resize}, {self.interpolation}, the central {self.size} x {self.size}"
        else:
            scaled = f"scaled to {self.resize} x {self.resize}, {self.interpolation}"
            scaled += f", the central {self.size} x {self.size}" if self.resize != self.size else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{scaled}, mean {mean}, deviation {std} (of pixels from 0 to 1)"


def preprocessing_to_data(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the fields by name as a dict of lists, numbers and text, for files."""
    data = asdict(preprocessing)
    return {**data, "mean": list(preprocessing.mean), "std": list(preprocessing.std)}


def preprocessing_from_data(data: Any) -> Preprocessing:
    """Return the preprocessing that :func:`preprocessing_to_data` turned into ``data``.

    A field that ``data`` lacks gets its default.

    Raises:
        ValueError: ``data`` is no dict, lacks ``"size"`` or ``"resize"``, or has a key that is no field, or a value
            that :class:`Preprocessing` refuses.
    """
    data = with_defaults(Preprocessing, data) if isinstance(data, Mapping) else {}
    if set(data) != {field.name for field in fields(Preprocessing)}:
        raise ValueError("its preprocessing is not one")
    try:
        moments = {name: tuple(float(value) for value in data[name]) for name in ("mean", "std")}
        sizes = {name: int(data[name]) for name in ("size", "resize", "channels")}
        return Preprocessing(**{**data, **moments, **sizes})
    except (TypeError, OverflowError) as error:  # None, and JSON's Infinity
        raise ValueError(f"its preprocessing is not one: {error}") from error


def add_preprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for scaling images: ``--preprocessing``, ``--image-size``, ``--channels``, ``--crop`` and others.

    The others are ``--resize``, ``--interpolation``, ``--mean`` and ``--std``; the last two become tuples of floats.
    An option that is not given is None, but ``--preprocessing`` is ``"auto"``.
    """
    group = parser.add_argument_group("preprocessing of images")
    group.add_argument(
        "--preprocessing",
        choices=("auto", "data", "torchvision", "timm", "model"),
        default="auto",
        help="data: stretched, mean and deviation of the training images; torchvision, timm: their conventions for "
        "ImageNet; model: timm's config in the model, or the transforms of torchvision's weights; auto: the model's if "
        "it has one, else data",
    )
    group.add_argument("--image-size", type=int, metavar="N", help="side of the model's input; 32 unless a config says")
    group.add_argument("--channels", type=int, choices=(1, 3), help="of the model's input; 1 reads photos as grey")
    group.add_argument("--crop", choices=get_args(Crop), help="stretch to a square, or cut the centre out")
    group.add_argument("--resize", type=int, metavar="N", help="side that images are scaled to before the crop")
    group.add_argument("--interpolation", choices=get_args(Interpolation), help="filter of the scaling")
    group.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of pixels from 0 to 1: 0.485,0.456,0.406")
    group.add_argument("--std", type=_numbers, metavar="R,G,B", help="deviation likewise; 0,0,0 and 1,1,1: pixels/255")


def given_options(arguments: argparse.Namespace) -> list[str]:
    """Return which options of :func:`add_preprocessing_arguments` the user gave, such as ``["--mean", "--std"]``.

    ``--preprocessing auto`` counts as not given.
    """
    names = ("image_size", "channels", "crop", "resize", "interpolation", "mean", "std")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    return given + (["--preprocessing"] if arguments.preprocessing != "auto" else [])


def choose_preprocessing(arguments: argparse.Namespace, model: nn.Module, digits: bool = False) -> Preprocessing:
    """Return the preprocessing that the options ask for; without mean and deviation if the images' own are to be taken.

    ``--preprocessing auto`` takes timm's config in the model, or that of torchvision's weights which ``--model-arg
    weights=NAME`` names; if there is none, or for digits, that of ``data``. ``model`` takes the same configs, for
    digits too, and of a factory of torchvision without named weights that of its default weights. ``data`` is stretched
    to 32 × 32 in colours (digits: 8 × 8 in grey), with the images' own mean and deviation. ``torchvision`` and ``timm``
    are these libraries' conventions for ImageNet: shorter side 256, the central 224 × 224.

    Other options, such as ``--crop``, win over ``--preprocessing``. One number in ``--mean`` or ``--std`` counts for
    all channels. Without ``--resize`` a new size or crop sets it: to the size, or for ``"center"`` to size / 0.875.

    Args:
        arguments: the parsed command line, with the options of :func:`add_preprocessing_arguments`, ``model_arg``, and
            ``model``, the factory or file as text.
        model: whose config is read with ``--preprocessing auto`` or ``model``.
        digits: whether the images are scikit-learn's digits.

    Raises:
        ValueError: options that contradict each other or that :class:`Preprocessing` refuses, a config of timm whose
            images are not square, or with ``--preprocessing model`` a model without a config.
    """
    named = _named(arguments.preprocessing, arguments, model, digits)
    channels = arguments.channels or named.channels
    changes = {name: value for name in ("crop", "interpolation", "mean", "std") if (value := getattr(arguments, name))}
    size = named.size if arguments.image_size is None else arguments.image_size
    if (arguments.mean is None) != (arguments.std is None) and not named.mean:
        raise ValueError("--mean and --std go together")
    for name in ("mean", "std"):
        values = changes.get(name, getattr(named, name))
        changes[name] = values * channels if len(values) == 1 else values
    crop = changes.get("crop", named.crop)
    if arguments.resize is not None:
        changes["resize"] = arguments.resize
    elif size != named.size or crop != named.crop:
        changes["resize"] = size if crop == "stretch" else math.floor(size / _CROP_SHARE)
    return replace(named, size=size, channels=channels, **changes)


def _named(name: str, arguments: argparse.Namespace, model: nn.Module, digits: bool) -> Preprocessing:
    size, channels = (_SIZE_OF_DIGITS, _GREY) if digits else (_SIZE_OF_PHOTOS, COLOURS)
    data = Preprocessing(size, size, channels=channels)
    if name in ("auto", "model") and not (digits and name == "auto"):
        own = _from_timm(model) or _from_torchvision(arguments, any_weights=name == "model")
        if own is None and name == "model":
            raise ValueError(
                f"{type(model).__name__} has no preprocessing of its own (timm's pretrained_cfg, or a factory of "
                "torchvision.models): pass --mean, --std and --image-size"
            )
        return own or data
    if name in ("torchvision", "timm"):
        resize = math.floor(_IMAGENET_SIZE / _CROP_SHARE)
        return Preprocessing(
            _IMAGENET_SIZE,
            resize,
            "center",
            "bilinear" if name == "torchvision" else "bicubic",
            _IMAGENET_MEAN,
            _IMAGENET_STD,
        )
    return data


def _from_timm(model: nn.Module) -> Preprocessing | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return None
    channels, height, width = config["input_size"]
    if height != width:
        raise ValueError(
            f"the model's config asks for {height} x {width} pixels: pass --preprocessing timm, --image-size"
        )
    crop: Crop = "stretch" if config.get("crop_mode") == "squash" else "center"
    interpolation = config.get("interpolation", "bicubic")
    return Preprocessing(
        height,
        math.floor(height / config.get("crop_pct", _CROP_SHARE)),
        crop,
        interpolation if interpolation in get_args(Interpolation) else "bilinear",
        tuple(config.get("mean", _IMAGENET_MEAN)),
        tuple(config.get("std", _IMAGENET_STD)),
        channels,
    )


def _from_torchvision(arguments: argparse.Namespace, any_weights: bool) -> Preprocessing | None:
    """Return the transforms of the weights that ``--model-arg weights=`` names.

    With ``any_weights`` those of the factory's best weights are taken if the user names none. None: there are no
    weights, they are of no classifier, or the model is not torchvision's.
    """
    module, _, factory = arguments.model.partition(":")
    given = dict(word.partition("=")[::2] for word in arguments.model_arg).get("weights", "None").strip("\"'")
    if not module.startswith("torchvision.models") or (given == "None" and not any_weights):
        return None
    from torchvision.models import get_model_weights

    try:
        transforms = get_model_weights(factory)["DEFAULT" if given == "None" else given.rpartition(".")[2]].transforms()
    except (ValueError, KeyError):  # a factory without weights of its own, such as get_model; or unknown ones
        return None
    if not hasattr(transforms, "crop_size"):
        return None
    return Preprocessing(
        transforms.crop_size[0],
        transforms.resize_size[0],
        "center",
        transforms.interpolation.value,
        tuple(transforms.mean),
        tuple(transforms.std),
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
