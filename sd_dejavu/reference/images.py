"""Images from files' bytes, as a trainer sees them, and their thumbnails."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kept import digest_of
from ..kept.foreign import PIXELS, Unreadable, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_FURTHER = {  # formats that Pillow reads with a plugin, or from some version on
    "AVIF": ("pillow_avif", "Pillow 11.3 or the package pillow-avif-plugin"),
    "JXL": ("pillow_jxl", "the package pillow-jxl-plugin"),
}
LONGEST = 50  # times as long as wide: more is no image, and would fill the memory at a network's size


class ImageError(Unreadable):
    """Bytes that are no usable image; the text says why."""


@cache
def formats() -> tuple[str, ...]:
    """Those that can be read here."""
    from PIL import Image

    for plugin, _ in _FURTHER.values():
        if importlib.util.find_spec(plugin) is not None:
            with suppress(ImportError, OSError):  # one that does not fit this Pillow
                importlib.import_module(plugin)
    Image.init()
    return (*FORMATS, *(name for name in _FURTHER if name in Image.OPEN))


def missing_decoder(name: str) -> str:
    """What an image file of this name needs that is not here; '' for nothing."""
    kind = name.rpartition(".")[2].upper()
    return "" if kind not in _FURTHER or kind in formats() else f"reading .{kind.lower()} needs {_FURTHER[kind][1]}"


def open_image(data: bytes, upright: bool = True) -> Image:
    """In RGB, and ``upright`` as its EXIF data says; what lies under transparency stays, as with the trainers.

    Raises ImageError with the reason.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats())
            _check_size(*image.size)  # as its header says: nothing is decoded yet
            image.load()
            turned = ImageOps.exif_transpose(image) if upright else image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a known format ({', '.join(formats())})") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit is higher, unless a host has lowered it
        raise ImageError(f"too large: more than {PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise many types for broken bytes
        raise ImageError(f"broken: {one_line(error)}") from error
    if turned.mode == "I;16":
        turned = turned.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return turned.convert("RGB")


def to_tensor(image: Image) -> Tensor:
    """[1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div_(255)


def digest(image: Image) -> str:
    """Equal for equal size and pixels, whatever the file format."""
    return digest_of([image.tobytes(), repr(image.size)], 32, "blake2b")


def thumbnail(image: Image, side: int) -> bytes:
    """JPEG, at most ``side`` x ``side``; smaller images stay as they are."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def _check_size(width: int, height: int) -> None:
    if width * height > PIXELS:
        raise ImageError(f"too large: {width} x {height} pixels, and at most {PIXELS:,} are read")
    if max(width, height) > LONGEST * min(width, height):
        raise ImageError(f"{width} x {height} pixels: too long and narrow")
