"""Images for pages: PNG data URIs, and the where-map laid over the image it belongs to."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]  # [H, W, 3]

# A dark-to-light ramp after matplotlib's inferno: brightness alone carries the order.
_STOPS = np.linspace(0, 1, 6)
_COLOURS = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], float)


def png_uri(pixels: Pixels) -> str:
    """uint8 [H, W, 3] as a ``data:image/png;base64,`` address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_checked(pixels)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


_PARTS, _ABOVE_NOISE = 4, 0.2  # a side; of the variance


def colours(values: NDArray[Any]) -> NDArray[np.float64]:
    """Numbers in 0..1, any shape [...], as colours [..., 3] in 0..255."""
    return np.stack([np.interp(values, _STOPS, channel) for channel in _COLOURS.T], axis=-1)


def where_overlay(image: Pixels, squared_difference: Tensor | NDArray[Any], opacity: float = 0.65) -> Pixels:
    """The map [h, w], scaled from its lowest to its highest value, in colour over the greyed image [H, W, 3].

    A map that is the same everywhere shows as the lowest colour; values that are not finite count as lowest.
    """
    from PIL import Image

    height, width = _checked(image).shape[:2]
    values = _numbers(squared_difference)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a where-map must have shape [height, width], not {list(values.shape)}")
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    scaled = np.where(finite, (values - low) / ((high - low) or 1), 0).astype(np.float32)
    smooth = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BILINEAR))
    grey = image.astype(float) @ (0.299, 0.587, 0.114)
    mixed = (1 - opacity) * grey[..., None] + opacity * colours(smooth)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def tells_parts(values: NDArray[Any]) -> bool:
    """Whether a map [h, w] tells parts of the image apart, as ComfyUI's page asks before it shows one.

    Of its variance, the share that lies between the sixteen parts of a 4 x 4 grid is far above that of noise, which is one
    over the cells of a part.

    >>> half = np.repeat([[0.0], [1.0]], 8, axis=0).repeat(16, axis=1)
    >>> tells_parts(half), tells_parts(np.ones((16, 16))), tells_parts(np.indices((16, 16)).sum(0) % 2)
    (True, False, False)
    """
    height, width = values.shape
    if height < _PARTS or width < _PARTS or not (whole := float(values.var())):
        return False
    rows, columns = (np.arange(side) * _PARTS // side for side in (height, width))
    parts = (_PARTS * rows[:, None] + columns).ravel()
    cells = np.bincount(parts)
    means = np.bincount(parts, values.ravel()) / cells
    return bool(means.var() / whole > _ABOVE_NOISE + 1 / (values.size / len(cells)))


def _numbers(values: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    return values.detach().cpu().double().numpy()


def _checked(pixels: Pixels) -> Pixels:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels
