"""Random changes of training images (augmentation), reproducible: each follows from seed, epoch and image alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonq.cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

OWN = ("flip", "crop")
# By torchvision's classes.
TORCHVISION = {"trivial": "TrivialAugmentWide", "rand": "RandAugment", "auto": "AutoAugment", "mix": "AugMix"}
_CROP_ATTEMPTS = 10
_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """A list of random changes of an image, in the order in which they are made; :meth:`pixels` makes them.

    It is False as a bool if ``names`` is empty. :meth:`named` makes one from a text and refuses unknown names; the
    constructor does not check ``names``.

    Attributes:
        names: a tuple of names. ``"flip"``: left and right exchanged, half of the time; ``"crop"``: a random part of
            8 to 100 % of the area, scaled to the model's input (as torchvision's RandomResizedCrop); ``"trivial"``,
            ``"rand"``, ``"auto"``, ``"mix"``: torchvision's TrivialAugmentWide, RandAugment, AutoAugment and AugMix.
    """

    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        return ",".join(self.names) or "none"

    @classmethod
    def named(cls, text: str) -> Augmentation:
        """Return the augmentation for the text of ``--augment``, such as ``"flip,crop"``; ``"none"`` or "": no changes.

        Raises:
            ValueError: an unknown name, or one that needs torchvision where it can't be imported.
        """
        names = tuple(name for name in text.split(",") if name and name != "none")
        for name in names:
            if name in TORCHVISION:
                _policy(name)
            elif name not in OWN:
                known = ", ".join(("none", *OWN, *TORCHVISION))
                raise ValueError(f"unknown augmentation {name!r}; known: {known}, with commas between them")
        return cls(names)

    def pixels(self, image: Image, preprocessing: Preprocessing, seed: tuple[int, int]) -> Tensor:
        """Return the changed and scaled image, on the CPU, without mean and deviation: uint8 (channels, size, size).

        Args:
            image: the image, in any of Pillow's modes of 8 bits.
            preprocessing: size and channels of the result, and how the changed image is scaled and cut to that size;
                with ``"crop"`` among the changes, which cuts to the size itself, only size, channels and interpolation
                count.
            seed: ``(seed of the data set in this epoch, index of the image in it)``. Only from this pair random numbers
                follow; torch's generator of the CPU is afterwards as it was.
        """
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would seed the generators of GPUs, too.
            torch.default_generator.manual_seed(
                int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "little") >> 1
            )
            image = image.convert("RGB")
            for name in self.names:
                image = _change(name, image, preprocessing)
        if "crop" in self.names:
            return preprocessing.as_pixels(image.convert("RGB" if preprocessing.channels > 1 else "L"))
        return preprocessing.pixels(image)


def _change(name: str, image: Image, preprocessing: Preprocessing) -> Image:
    from PIL.Image import Resampling, Transpose

    if name == "flip":
        return image.transpose(Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(1)) < 0.5 else image
    if name == "crop":
        size = (preprocessing.size, preprocessing.size)
        return image.resize(size, Resampling[preprocessing.interpolation.upper()], box=_random_box(*image.size))
    return _policy(name)(image)


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of a random part of an image, as torchvision's RandomResizedCrop chooses it.

    Its share of the area is uniform in 8 to 100 %, the logarithm of width / height uniform between those of 3/4 and
    4/3. If ten tries give no part that fits, it is the central square.
    """
    low, high = (math.log(ratio) for ratio in _CROP_RATIO)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * float(torch.empty(1).uniform_(*_CROP_AREA))
        ratio = math.exp(float(torch.empty(1).uniform_(low, high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _policy(name: str) -> Callable[[Image], Image]:
    try:
        from torchvision import transforms
    except Exception as error:  # where its operators don't fit this torch, it raises RuntimeError
        raise ValueError(f"--augment {name} needs torchvision: {error}") from error
    policy: Callable[[Image], Image] = getattr(transforms, TORCHVISION[name])()
    return policy
