"""Read image files of every common kind as 8-bit pixels, or say in one line why that is not possible."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tritonq.cli.messages import reason_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Those that Pillow reads here or with a plugin; of a file that it can't read, a command says so.
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tga", ".jp2", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"}
)
# Pillow's modes of one channel with more than 8 bits.
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")
_DEEPEST = 65535


class UnreadableImageError(ValueError):
    """Raised for a file that is gone, holds no whole image or one too large, or whose values have no known range."""


def decode(path: Path, content: bytes | None = None) -> Image:
    """Return the image in a file as a Pillow image of at most 8 bits per channel.

    Grey images of 16 bits keep their whole range: 0 … 65535 becomes 0 … 255, mode "L". A palette with transparency
    becomes "RGBA". Any other image keeps its mode, such as "1", "P", "RGB" or "CMYK".

    Args:
        path: the file.
        content: its bytes, where they were read already; None: they are read from ``path``.

    Raises:
        UnreadableImageError: the file is gone, damaged, too large or of a kind that Pillow does not read, or holds
            floating-point values or integers outside 0 … 65535. The message does not name the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path if content is None else BytesIO(content)) as image:
                image.load()
                return _in_eight_bits(image)
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"too large: {error}") from error
    except UnidentifiedImageError as error:  # its message names a Python object
        raise UnreadableImageError("not an image of a kind that Pillow reads") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for damaged files
        raise UnreadableImageError(reason_of(error)) from error


def _in_eight_bits(image: Image) -> Image:
    from PIL import Image

    if image.mode in _DEEP_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _DEEPEST:
            raise ValueError(f"values from {values.min()} to {values.max()} are no image of 16 bits")
        return Image.fromarray(((values * 255 + _DEEPEST // 2) // _DEEPEST).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of other ways from here to three channels
        return image.convert("RGBA")
    return image.copy()
